"""AutoNAT: who is dialled back, where, how often; and what a peer's verdict means."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing
from multiaddr import Multiaddr

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    DeadlineExceeded,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamReset,
)
from kwaainet_bridge.net import HostConfig, Libp2pHost, Stream, open_host
from kwaainet_bridge.net.addresses import Address, parse_address
from kwaainet_bridge.net.autonat import AUTONAT, AutoNatService, DialBack, ask, read_answer
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.memory import MemoryNetwork, memory_stream_pair
from kwaainet_bridge.net.probe import dial_anew
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.pb.autonat_pb2 import Dial, DialResponse, Message, PeerInfo
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.varint import encode_uvarint

US = PeerId(bytes.fromhex("002408011220") + bytes(32))
ASKER = PeerId(bytes.fromhex("002408011220") + bytes(31) + b"\x01")
SEEN = "203.0.113.9"


def peer(number: int) -> PeerId:
    return PeerId(bytes.fromhex("002408011220") + number.to_bytes(32, "big"))


class Dialling:
    """A service, and what it dials; ``reached`` is what the next dials reach."""

    def __init__(self, seen: str = SEEN, reached: Address | Exception | None = None) -> None:
        self.dialled: list[list[str]] = []
        self.reached = reached
        self.takes = 0.0
        self.under_way = self.most_at_once = 0
        self.now = 0.0
        self.service = AutoNatService(lambda _: seen, self._dial, clock=lambda: self.now)

    async def _dial(self, _peer: PeerId, addresses: Sequence[Address]) -> Address:
        self.dialled.append([str(a) for a in addresses])
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await trio.sleep(self.takes)
        finally:
            self.under_way -= 1
        if isinstance(self.reached, Exception):
            raise self.reached
        return addresses[0] if self.reached is None else self.reached

    async def answer(self, request: bytes, asker: PeerId = ASKER) -> bytes:
        """Serve one stream whose peer sends ``request``; return all that comes back."""
        ours, theirs = memory_stream_pair(asker, US, AUTONAT)
        await ours.write(request)
        await self.service.serve(theirs)
        await theirs.close()
        answer = b""
        while data := await ours.read(65536):
            answer += data
        return answer

    async def ask(self, *addresses: str, asker: PeerId = ASKER, named: bytes | None = None) -> DialResponse:
        request = PeerInfo(
            id=asker.raw if named is None else named, addrs=[Multiaddr(a).to_bytes() for a in addresses]
        )
        answer = await self.answer(delimited(Message(type=Message.DIAL, dial=Dial(peer=request))), asker)
        [body] = DelimitedDecoder(4096).feed(answer)
        message = Message.FromString(body)
        assert message.type == Message.DIAL_RESPONSE
        return message.dial_response


def delimited(message: Message) -> bytes:
    body = message.SerializeToString()
    return encode_uvarint(len(body)) + body


# --- serving: where


async def test_an_asker_is_dialled_at_its_own_address() -> None:
    dialling = Dialling()
    answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001")
    assert dialling.dialled == [["/ip4/203.0.113.9/tcp/4001"]]
    assert answer.status == DialResponse.OK
    assert answer.addr == Address("ip4", SEEN, 4001).binary


async def test_only_where_the_asker_is_seen_whatever_it_names() -> None:
    dialling = Dialling()
    await dialling.ask(
        "/ip4/198.51.100.1/tcp/4001",  # somebody else's; a forwarded port may well be the same
        "/ip4/192.168.1.5/tcp/4001",
        "/ip6/2001:db8::1/tcp/4002",
        "/dns4/victim.example/tcp/4003",
        f"/ip4/198.51.100.2/tcp/4004/p2p/{ASKER}",
    )
    assert dialling.dialled == [[f"/ip4/{SEEN}/tcp/{port}" for port in (4001, 4002, 4003, 4004)]]


async def test_private_addresses_are_dialled_if_the_asker_has_them() -> None:
    dialling = Dialling(seen="192.168.1.5")
    await dialling.ask("/ip4/203.0.113.9/tcp/4002", "/ip4/192.168.1.5/tcp/4001")
    assert dialling.dialled == [["/ip4/192.168.1.5/tcp/4001"]]


async def test_an_asker_behind_a_proxy_gets_no_verdict() -> None:
    """A container's, for instance: the address is that of a machine between."""
    dialling = Dialling(seen="172.17.0.1")
    answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001", "/ip4/192.168.1.5/tcp/4001")
    assert answer.status == DialResponse.E_DIAL_REFUSED
    assert dialling.dialled == []


async def test_ip6() -> None:
    dialling = Dialling(seen="2001:db8::7")
    await dialling.ask("/ip6/::/tcp/4001")
    assert dialling.dialled == [["/ip6/2001:db8::7/tcp/4001"]]


@pytest.mark.parametrize(
    "named",
    [
        [],
        ["/ip4/203.0.113.9/udp/4001/quic-v1"],
        ["/ip4/203.0.113.9/tcp/0"],
        [f"/ip4/203.0.113.9/tcp/4001/p2p/{US}/p2p-circuit"],
        ["/ip4/203.0.113.9/tcp/4001/ws"],
    ],
    ids=str,
)
async def test_nothing_to_dial(named: list[str]) -> None:
    dialling = Dialling()
    answer = await dialling.ask(*named)
    assert answer.status == DialResponse.E_DIAL_REFUSED
    assert answer.status_text == "no address that can be dialled from here"
    assert dialling.dialled == []


@pytest.mark.parametrize("seen", ["", "fe80::1%eth0"])
async def test_an_asker_that_is_seen_at_no_address(seen: str) -> None:
    """Through a relay only, for instance."""
    dialling = Dialling(seen)
    answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001")
    assert answer.status == DialResponse.E_DIAL_REFUSED
    assert dialling.dialled == []


@pytest.mark.parametrize("named", [peer(5).raw, b"", b"\xff" * 40])
async def test_a_peer_asks_about_itself_only(named: bytes) -> None:
    dialling = Dialling()
    answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001", named=named)
    assert answer.status == DialResponse.E_BAD_REQUEST
    assert dialling.dialled == []


async def test_a_bounded_number_of_addresses() -> None:
    dialling = Dialling()
    await dialling.ask(*(f"/ip4/203.0.113.9/tcp/{port}" for port in range(4000, 4040)))
    assert [len(addresses) for addresses in dialling.dialled] == [defaults.MAX_AUTONAT_ADDRESSES]


# --- serving: what is answered


async def test_a_failure_takes_as_long_whatever_failed(autojump_clock) -> None:
    for takes in (0.0, 7.0, 100.0):
        dialling = Dialling(reached=PeerUnreachable("nobody there", hop="tcp"))
        dialling.takes = takes
        began = trio.current_time()
        answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001")
        assert answer.status == DialResponse.E_DIAL_ERROR
        assert answer.status_text == "dial failed"  # and not why
        assert trio.current_time() - began == pytest.approx(defaults.AUTONAT_DIAL_SECONDS)


async def test_another_identity_at_the_address_is_a_failure(autojump_clock) -> None:
    dialling = Dialling(reached=RemoteError("another peer answers there"))
    assert (await dialling.ask("/ip4/203.0.113.9/tcp/4001")).status == DialResponse.E_DIAL_ERROR


async def test_golden_exchange() -> None:
    """As go-libp2p writes it: proto2 marshals what is set, zeros included."""
    request = bytes.fromhex("38 0800 1234 0a32 0a26") + ASKER.raw + bytes.fromhex("1208 04c0a80105060fa1")
    dialling = Dialling()
    assert await dialling.answer(request) == bytes.fromhex("10 0801 1a0c 0800 1a08 04cb007109060fa1")
    assert dialling.dialled == [["/ip4/203.0.113.9/tcp/4001"]]


async def test_an_address_that_is_cut_short_is_passed_over() -> None:
    request = bytes.fromhex("36 0800 1232 0a30 0a26") + ASKER.raw + bytes.fromhex("1206 04c0a8010506")
    assert (await Dialling().answer(request))[1:8] == bytes.fromhex("0801 1a2c 0865 12")  # E_DIAL_REFUSED


@pytest.mark.parametrize(
    "request_",
    [b"", b"\x05\x08", b"\x03\x0a\xff\x01", b"\x02\x08\x01", encode_uvarint(1 << 20)],
    ids=["nothing", "cut short", "no message", "an answer", "too long"],
)
async def test_malformed_requests(request_: bytes) -> None:
    dialling = Dialling()
    ours, theirs = memory_stream_pair(ASKER, US, AUTONAT)
    await ours.write(request_)
    await ours.close()
    with pytest.raises(RemoteError):
        await dialling.service.serve(theirs)
    assert dialling.dialled == []


async def test_an_asker_that_says_nothing(autojump_clock) -> None:
    ours, theirs = memory_stream_pair(ASKER, US, AUTONAT)
    began = trio.current_time()
    await Dialling().service.serve(theirs)
    assert trio.current_time() - began == pytest.approx(defaults.AUTONAT_SECONDS)
    with pytest.raises(StreamReset):
        await ours.read(1)


# --- serving: how often


async def test_a_few_for_each_peer_and_minute() -> None:
    dialling = Dialling()

    async def allowed(asker: PeerId) -> bool:
        answer = await dialling.ask("/ip4/203.0.113.9/tcp/4001", asker=asker)
        assert answer.status in (DialResponse.OK, DialResponse.E_DIAL_REFUSED)
        assert answer.status_text == ("" if answer.status == DialResponse.OK else "too many dials")
        return answer.status == DialResponse.OK

    each = defaults.AUTONAT_DIALS_PER_PEER
    assert [await allowed(ASKER) for _ in range(each + 2)] == [True] * each + [False] * 2
    assert await allowed(peer(5))
    dialling.now += defaults.AUTONAT_PERIOD_SECONDS - 1
    assert not await allowed(ASKER)
    dialling.now += 1
    assert await allowed(ASKER)


async def test_some_for_all_together_and_minute() -> None:
    dialling = Dialling()
    for number in range(1000):
        await dialling.ask("/ip4/203.0.113.9/tcp/4001", asker=peer(number))
    assert len(dialling.dialled) == defaults.AUTONAT_DIALS
    dialling.now += defaults.AUTONAT_PERIOD_SECONDS
    await dialling.ask("/ip4/203.0.113.9/tcp/4001", asker=peer(0))
    assert len(dialling.dialled) == defaults.AUTONAT_DIALS + 1


async def test_what_is_refused_anyway_costs_nothing() -> None:
    dialling = Dialling()
    for _ in range(20):
        await dialling.ask()
        await dialling.ask("/ip4/203.0.113.9/tcp/4001", named=peer(5).raw)
    assert (await dialling.ask("/ip4/203.0.113.9/tcp/4001")).status == DialResponse.OK


async def test_a_few_at_once(autojump_clock) -> None:
    dialling = Dialling(reached=PeerUnreachable("silent", hop="tcp"))
    dialling.takes = 10
    answers = []

    async def one(number: int) -> None:
        answers.append((await dialling.ask("/ip4/203.0.113.9/tcp/4001", asker=peer(number))).status)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)
    assert dialling.most_at_once == len(dialling.dialled) == defaults.AUTONAT_DIALS_AT_ONCE
    assert answers.count(DialResponse.E_DIAL_REFUSED) == 20 - defaults.AUTONAT_DIALS_AT_ONCE
    dialling.reached = None
    assert (await dialling.ask("/ip4/203.0.113.9/tcp/4001")).status == DialResponse.OK


async def test_a_cancelled_dial_gives_its_place_back() -> None:
    dialling = Dialling()
    dialling.takes = 3600
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialling.ask, "/ip4/203.0.113.9/tcp/4001")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert dialling.under_way == dialling.service._dialling == 0


# --- asking


def answered(**fields) -> bytes:
    return Message(type=Message.DIAL_RESPONSE, dial_response=DialResponse(**fields)).SerializeToString()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            bytes.fromhex("0801 1a0c 0800 1a08 04cb007109060fa1"),
            DialBack(True, Address("ip4", "203.0.113.9", 4001)),
        ),
        (answered(status=DialResponse.OK), DialBack(True)),
        (answered(status=DialResponse.OK, addr=b"\xff"), DialBack(True)),
        (
            bytes.fromhex("0801 1a10 0864 120c") + b"dial failed\x1b",
            DialBack(False, text="dial failed?"),
        ),
        (answered(status=DialResponse.E_DIAL_REFUSED, status_text="busy"), DialBack(None, text="busy")),
        (answered(status=DialResponse.E_BAD_REQUEST, status_text="no\nway"), DialBack(None, text="no?way")),
        (answered(status=DialResponse.E_INTERNAL_ERROR), DialBack(None, text="E_INTERNAL_ERROR")),
        (
            answered(status=DialResponse.E_DIAL_REFUSED, status_text="x" * 3000),
            DialBack(None, text="x" * defaults.MAX_AUTONAT_CHARACTERS),
        ),
    ],
)
def test_what_an_answer_means(body: bytes, expected: DialBack) -> None:
    assert read_answer(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"\x08\x01",
        bytes.fromhex("0800 1a02 0800"),  # OK, in a DIAL
        bytes.fromhex("0801 1a02 0807"),  # a status that there is not: no verdict, and surely not OK
        bytes.fromhex("0801 1a00"),
        bytes.fromhex("0801 1a04 0864 1201 ff"),
        bytes.fromhex("0801 1a05 0864 1201 ff"),
    ],
    ids=bytes.hex,
)
def test_malformed_answers(body: bytes) -> None:
    with pytest.raises(RemoteError):
        read_answer(body)


@pytest.fixture
def network(nursery) -> MemoryNetwork:
    return MemoryNetwork(nursery)


async def test_what_is_asked(network: MemoryNetwork) -> None:
    asker, server, requests = network.host(ASKER), network.host(US), []

    async def note(stream: Stream) -> None:
        requests.append(await stream.read(65536))
        await stream.write(bytes.fromhex("06 0801 1a02 0865"))

    server.serve(AUTONAT, note)
    addresses = [
        Address("ip4", "192.168.1.5", 4001),
        Address("dns4", "a.example", 4001),
        Address("ip4", SEEN, 4001, relay=US),
    ]
    assert await ask(asker, US, addresses) == DialBack(None, text="E_DIAL_REFUSED")
    direct = bytes.fromhex("1208 04c0a80105060fa1")
    assert requests == [bytes.fromhex("38 0800 1234 0a32 0a26") + ASKER.raw + direct]


@pytest.mark.parametrize("port", [4001, 53])
async def test_an_address_that_was_not_asked_about_is_not_believed(network: MemoryNetwork, port: int) -> None:
    """Others are told of it: whoever names a third party's would have them all knock there."""
    asker, server = network.host(ASKER), network.host(US)

    async def say_yes(stream: Stream) -> None:
        await stream.read(65536)
        answer = DialResponse(status=DialResponse.OK, addr=Address("ip4", SEEN, port).binary)
        body = Message(type=Message.DIAL_RESPONSE, dial_response=answer).SerializeToString()
        await stream.write(encode_uvarint(len(body)) + body)

    server.serve(AUTONAT, say_yes)
    asked = Address("ip4", SEEN, 4001)
    found = await ask(asker, US, [Address("ip4", "10.0.0.1", 53), asked])
    assert found == DialBack(True, asked if port == asked.port else None)


async def test_a_question_fits_into_a_message(network: MemoryNetwork) -> None:
    asker, server, sizes = network.host(ASKER), network.host(US), []

    async def note(stream: Stream) -> None:
        sizes.append(len(await stream.read(65536)))

    server.serve(AUTONAT, note)
    with pytest.raises(RemoteError, match="without a message"):
        await ask(asker, US, [Address("ip6", f"2001:db8::{n:x}", 65535) for n in range(999)])
    assert sizes[0] < defaults.MAX_AUTONAT_BYTES


async def test_a_peer_that_does_not_answer(network: MemoryNetwork, autojump_clock) -> None:
    asker, server = network.host(ASKER), network.host(US)

    async def silent(_stream: Stream) -> None:
        await trio.sleep_forever()

    server.serve(AUTONAT, silent)
    began = trio.current_time()
    with pytest.raises(DeadlineExceeded, match="within 30 s whether it can dial this host"):
        await ask(asker, US, [])
    assert trio.current_time() - began == pytest.approx(defaults.AUTONAT_SECONDS)


async def test_a_peer_that_does_not_serve_it(network: MemoryNetwork) -> None:
    asker, _ = network.host(ASKER), network.host(US)
    with pytest.raises(ProtocolNotSupported):
        await ask(asker, US, [])


# --- over loopback


def serve_autonat(host: Libp2pHost) -> None:
    def seen(asker: PeerId) -> str:
        connection = host.connections.find(asker)
        return "" if connection is None else connection.remote_host

    host.serve(AUTONAT, AutoNatService(seen, dial_anew).serve)


def own(host: Libp2pHost) -> list[Address]:
    return [a for a in map(parse_address, host.addresses()) if a is not None]


async def test_a_host_that_can_be_dialled(client: Libp2pHost, server: Libp2pHost) -> None:
    serve_autonat(server)
    await client.connect(server.addresses()[0])
    [address] = own(client)
    assert await ask(client, server.peer_id, [address]) == DialBack(True, address.without_peer())
    assert server.connected_peers() == [client.peer_id]
    assert server.connections.count == 1  # it was another host that dialled


async def test_a_host_that_only_dials(server: Libp2pHost, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "AUTONAT_DIAL_SECONDS", 0.5)
    serve_autonat(server)
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as client:
        await client.connect(server.addresses()[0])
        # where the server itself listens: somebody answers there, who is not the asker
        for where in (Address("ip4", "127.0.0.1", 1), own(server)[0]):
            assert await ask(client, server.peer_id, [where]) == DialBack(False, text="dial failed")


async def test_dialling_anew(server: Libp2pHost) -> None:
    [address] = own(server)
    refused = Address("ip4", "127.0.0.1", 1)
    assert await dial_anew(server.peer_id, [refused, address]) == address.without_peer()
    with pytest.raises(PeerUnreachable):
        await dial_anew(server.peer_id, [refused])
    with pytest.raises(PeerUnreachable, match="no address"):
        await dial_anew(server.peer_id, [address.through(US)])  # a relay would prove nothing
    with pytest.raises(PeerUnreachable):
        await dial_anew(US, [address])
