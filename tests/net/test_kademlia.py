# ruff: noqa: ARG002 - pretend classes keep the arguments of what they stand for
"""Kademlia: answers byte for byte, and lookups over hosts that only pretend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import PeerUnreachable, ProtocolNotSupported, RemoteError
from kwaainet_bridge.net import Host, HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.identify import PeerDescription
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.kademlia import FIND_NODE, KAD, Kademlia, nearest
from kwaainet_bridge.net.memory import memory_stream_pair
from kwaainet_bridge.wire.pb import kad_pb2
from kwaainet_bridge.wire.peer_id import PeerId


def peer_id(number: int) -> PeerId:
    return PeerId(bytes.fromhex("002408011220") + number.to_bytes(32, "big"))


def address(port: int) -> Address:
    return Address("ip4", "127.0.0.1", port)


class PretendNetwork:
    """Hosts 0, 1, 2 … in one process; each is connected to the neighbours it is given."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.hosts: dict[PeerId, PretendHost] = {}

    def host(self, number: int, *neighbours: int, protocol: str = KAD) -> PretendHost:
        host = PretendHost(self, number, neighbours, protocol)
        self.hosts[host.peer_id] = host
        return host


class PretendHost:
    def __init__(
        self, network: PretendNetwork, number: int, neighbours: Sequence[int], protocol: str
    ) -> None:
        self.network = network
        self.protocol = protocol
        self.peer_id = peer_id(number)
        self.neighbours = [peer_id(n) for n in neighbours]
        self.addresses = {peer_id(n): [address(4000 + n)] for n in neighbours}
        self.addresses[self.peer_id] = [address(4000 + number)]
        self.kademlia = Kademlia(self, protocol)
        self.asked: list[PeerId] = []
        self.silent = False

    def connected_peers(self) -> list[PeerId]:
        return self.neighbours

    def where(self, peer: PeerId) -> list[Address]:
        return self.addresses.get(peer, [])

    def dialable(self, addresses: Sequence[Address], told_by: PeerId) -> list[Address]:
        return list(addresses)

    def description(self, peer: PeerId) -> PeerDescription:
        host = self.network.hosts.get(peer)
        return PeerDescription("pretend", frozenset([KAD if host is None else host.protocol]), ())

    async def wait_identified(self) -> None:
        await trio.lowlevel.checkpoint()

    async def open_stream_at(self, peer: PeerId, addresses: Sequence[Address], protocol: str):
        self.asked.append(peer)
        remote = self.network.hosts.get(peer)
        if remote is not None and protocol != remote.protocol:
            raise ProtocolNotSupported(protocol)
        if remote is None:
            raise PeerUnreachable("down", hop="tcp")
        ours, theirs = memory_stream_pair(self.peer_id, peer, protocol)
        if not remote.silent:
            self.network.nursery.start_soon(remote.kademlia.serve, theirs)
        return ours


@pytest.fixture
def network(nursery) -> PretendNetwork:
    return PretendNetwork(nursery)


# --- serving


async def converse(host: PretendHost, *requests: bytes) -> bytes:
    """Send ``requests``, end, and return all that is answered."""
    ours, theirs = memory_stream_pair(peer_id(99), host.peer_id, KAD)
    for request in requests:
        await ours.write(request)
    theirs._in.finished = True
    await host.kademlia.serve(theirs)
    await theirs.close()
    answer = b""
    while data := await ours.read(65536):
        answer += data
    return answer


async def test_asked_for_itself_it_names_itself(network: PretendNetwork) -> None:
    """What admits us to a Go peer's table; bytes as captured from hivemind 1.1.12's p2pd."""
    host = network.host(7)
    request = bytes.fromhex("2c 0804 1226") + host.peer_id.raw + bytes.fromhex("5001")
    entry = bytes.fromhex("0a26") + host.peer_id.raw + bytes.fromhex("1208 04 7f000001 06 0fa7 1801")
    assert await converse(host, request) == (
        bytes([2 + 2 + 38 + 2 + len(entry) + 2])
        + bytes.fromhex("0804 1226") + host.peer_id.raw
        + b"\x42" + bytes([len(entry)]) + entry
        + bytes.fromhex("5001")
    )  # fmt: skip


async def test_many_requests_on_one_stream(network: PretendNetwork) -> None:
    host = network.host(7, 1, 2)
    request = bytes.fromhex("2a 0804 1226") + peer_id(1).raw
    assert len(await converse(host, request * 3)) % 3 == 0


async def test_the_nearest_peers_are_named(network: PretendNetwork) -> None:
    host = network.host(0, *range(1, 40))
    answer = host.kademlia.answer(kad_pb2.Message(type=FIND_NODE, key=peer_id(77).raw))
    named = [PeerId(p.id) for p in answer.closer_peers]
    assert len(named) == defaults.KAD_BUCKET_PEERS
    assert named == nearest(peer_id(77).raw, host.neighbours)


async def test_a_peer_without_addresses_is_not_named(network: PretendNetwork) -> None:
    host = network.host(0, 1)
    host.addresses.pop(peer_id(1))
    assert not host.kademlia.answer(kad_pb2.Message(type=FIND_NODE, key=peer_id(1).raw)).closer_peers


async def test_a_peer_that_is_no_server_is_named_when_looked_for(network: PretendNetwork) -> None:
    host = network.host(0)
    host.addresses[peer_id(5)] = [address(1)]
    answer = host.kademlia.answer(kad_pb2.Message(type=FIND_NODE, key=peer_id(5).raw))
    assert [p.id for p in answer.closer_peers] == [peer_id(5).raw]


async def test_ping(network: PretendNetwork) -> None:
    assert await converse(network.host(0), b"\x02\x08\x05") == b"\x02\x08\x05"


@pytest.mark.parametrize("type_", [0, 2, 6, -1])
async def test_the_rest_closes_the_stream(network: PretendNetwork, type_: int) -> None:
    body = kad_pb2.Message(type=type_, key=b"/pk/x").SerializeToString()
    assert await converse(network.host(0), bytes([len(body)]) + body, b"\x02\x08\x05") == b""


@pytest.mark.parametrize("type_", [1, 3])
async def test_values_and_providers_are_not_kept_but_nearer_peers_are_named(network, type_: int) -> None:
    answer = network.host(0, 1, 2).kademlia.answer(kad_pb2.Message(type=type_, key=b"\x12\x20" + bytes(32)))
    assert len(answer.closer_peers) == 2
    assert not answer.HasField("record")
    assert not answer.provider_peers


@pytest.mark.parametrize(
    "sent", [b"\x03\x0a\xff\x01", b"\xff\xff\xff\xff\x7f", b"\x80" * 11, b"\x05\x08"], ids=str
)
async def test_malformed_requests(network: PretendNetwork, sent: bytes) -> None:
    host = network.host(0)
    ours, theirs = memory_stream_pair(peer_id(99), host.peer_id, KAD)
    await ours.write(sent)
    await ours.close()
    if sent == b"\x05\x08":  # cut short: the peer left
        await host.kademlia.serve(theirs)
    else:
        with pytest.raises(RemoteError):
            await host.kademlia.serve(theirs)


async def test_a_silent_stream_is_closed(network: PretendNetwork, autojump_clock) -> None:
    _, theirs = memory_stream_pair(peer_id(99), peer_id(0), KAD)
    start = trio.current_time()
    await network.host(0).kademlia.serve(theirs)
    assert trio.current_time() - start == pytest.approx(defaults.KAD_IDLE_SECONDS)


# --- asking


async def test_found_over_several_hops(network: PretendNetwork) -> None:
    seeker = network.host(0, 1)
    network.host(1, 0, 2)
    network.host(2, 1, 3)
    network.host(3, 2, 4)
    network.host(4, 3)
    assert await seeker.kademlia.find_peer(peer_id(4)) == [address(4004)]


async def test_nobody_knows(network: PretendNetwork) -> None:
    seeker = network.host(0, 1)
    network.host(1, 0, 2)
    network.host(2, 1)
    assert await seeker.kademlia.find_peer(peer_id(9)) == []
    assert sorted(seeker.asked) == [peer_id(1), peer_id(2)]


async def test_peers_that_are_down_or_silent_are_passed_over(network: PretendNetwork, autojump_clock) -> None:
    seeker = network.host(0, 1, 2, 3)
    network.host(2, 0).silent = True
    network.host(3, 0, 4)
    assert await seeker.kademlia.find_peer(peer_id(4)) == [address(4004)]


async def test_a_lookup_asks_a_bounded_number(network: PretendNetwork) -> None:
    """A peer that always names nearer peers cannot keep a lookup going."""
    seeker = network.host(0, 1)

    class Endless(Kademlia):
        numbers = iter(range(10, 10**6))

        def answer(self, request):
            answer = kad_pb2.Message(type=FIND_NODE)
            for number in (next(self.numbers) for _ in range(20)):
                network.host(number).kademlia = self
                answer.closer_peers.add(id=peer_id(number).raw, addrs=[address(1).binary])
            return answer

    network.host(1).kademlia = Endless(seeker)
    assert await seeker.kademlia.find_peer(peer_id(5)) == []
    assert len(seeker.asked) <= 3 * defaults.KAD_BUCKET_PEERS + defaults.KAD_CONCURRENCY


async def test_an_answer_with_a_bad_id(network: PretendNetwork) -> None:
    seeker = network.host(0, 1)

    class Liar(Kademlia):
        def answer(self, request):
            answer = kad_pb2.Message(type=FIND_NODE)
            answer.closer_peers.add(id=b"\x00", addrs=[b"\xff\xff"])
            return answer

    network.host(1).kademlia = Liar(seeker)
    assert await seeker.kademlia.find_peer(peer_id(5)) == []


# --- networks and modes

KWAAI = "/kwaai/kad/1.0.0"


async def test_a_network_with_another_id_is_neither_asked_nor_named(network: PretendNetwork) -> None:
    host = network.host(0, 1, 2, protocol=KWAAI)
    network.host(1, 0, 9)
    network.host(2, 0, protocol=KWAAI)
    answer = host.kademlia.answer(kad_pb2.Message(type=FIND_NODE, key=b"anything"))
    assert [p.id for p in answer.closer_peers] == [peer_id(2).raw]
    assert await host.kademlia.find_peer(peer_id(9)) == []
    assert host.asked == [peer_id(2)]


async def test_two_networks_on_one_host(network: PretendNetwork) -> None:
    host = network.host(0, 1, 2)
    other = Kademlia(host, KWAAI)
    network.host(1, 0, 9)
    network.host(2, 0, 8, protocol=KWAAI)
    assert await host.kademlia.find_peer(peer_id(9)) == [address(4009)]
    assert await other.find_peer(peer_id(8)) == [address(4008)]
    assert await other.find_peer(peer_id(9)) == []
    assert host.asked == [peer_id(1), peer_id(2), peer_id(2)]


async def test_a_client_asks_and_is_not_asked(server: Host) -> None:
    async with (
        open_host(HostConfig(Identity.generate("ed25519"))) as middle,
        open_host(HostConfig(Identity.generate("ed25519"), kad_mode="client")) as client,
    ):
        await server.connect(middle.addresses()[0])
        await middle.wait_identified()
        await client.connect(middle.addresses()[0])
        stream = await client.open_stream(server.peer_id, "Echo.run")
        await stream.write(b"found")
        assert await stream.read(10) == b"found"
        await middle.wait_identified()
        assert KAD not in middle.description(client.peer_id).protocols
        with pytest.raises(ProtocolNotSupported):
            await middle.open_stream(client.peer_id, KAD)


@pytest.mark.parametrize(("spoken", "found"), [(KWAAI, True), (KAD, False)])
async def test_real_hosts_of_another_network(spoken: str, found: bool) -> None:
    async def host(stack: AsyncExitStack, protocol: str) -> Libp2pHost:
        config = HostConfig(Identity.generate("ed25519"), kad_protocol=protocol)
        return await stack.enter_async_context(open_host(config))

    async with AsyncExitStack() as stack:
        seeker, middle, hidden = [await host(stack, protocol) for protocol in (KWAAI, spoken, spoken)]
        await hidden.connect(middle.addresses()[0])
        await middle.wait_identified()
        await seeker.connect(middle.addresses()[0])
        assert bool(await seeker.kademlia.find_peer(hidden.peer_id)) == found


async def test_three_real_hosts(server: Host, client: Host) -> None:
    async with open_host(HostConfig(Identity.generate("ed25519"))) as middle:
        await server.connect(middle.addresses()[0])
        await middle.wait_identified()
        await client.connect(middle.addresses()[0])
        stream = await client.open_stream(server.peer_id, "Echo.run")
        await stream.write(b"found")
        assert await stream.read(10) == b"found"
