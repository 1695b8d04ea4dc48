"""What a node answers, request by request, over the RPC room."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
import trio
from dht_nodes import START, Swarm, peer_id, swarm
from google.protobuf.message import Message
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CallBackFailed, ClockSkew, HandlerError, RemoteError
from kwaainet_bridge.hivemind.dht import Contact, DhtId, DhtNode
from kwaainet_bridge.hivemind.dht.messages import FIND, PING, STORE, StoreItem, store_request
from kwaainet_bridge.hivemind.dht.values import Regular, dictionary
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import CallContext, RpcServer
from kwaainet_bridge.wire.msgpack import pack, unpack
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

KEY = DhtId.of("key")
LATER = START + 100.0


class Peer:
    """A peer under the test's control beside one node: calls it, and answers its pings with ``pong``."""

    def __init__(self, swarm: Swarm, node: DhtNode, *, node_id: int = 77) -> None:
        self.swarm = swarm
        self.host = swarm.host()
        self.node = node
        self.node_id = DhtId(node_id)
        self.pong: pb.PingResponse | None = pb.PingResponse(peer=self.info, dht_time=START, available=True)
        self.pings: list[pb.PingRequest] = []
        self.stored: list[pb.StoreRequest] = []
        self.server = RpcServer(self.host)
        self.server.mount(PING, self.on_ping)
        self.server.mount(STORE, self.on_store)
        self.server.mount(FIND, self.on_find)

    @property
    def info(self) -> pb.NodeInfo:
        return pb.NodeInfo(node_id=self.node_id.to_bytes())

    async def on_ping(self, request: pb.PingRequest, _context: CallContext) -> pb.PingResponse:
        self.pings.append(request)
        if self.pong is None:
            await trio.sleep_forever()
        return self.pong

    async def on_store(self, request: pb.StoreRequest, _context: CallContext) -> pb.StoreResponse:
        self.stored.append(request)
        await trio.lowlevel.checkpoint()
        return pb.StoreResponse(store_ok=[True] * len(request.keys), peer=self.info)

    async def on_find(self, request: pb.FindRequest, _context: CallContext) -> pb.FindResponse:
        await trio.lowlevel.checkpoint()
        return pb.FindResponse(results=[pb.FindResult() for _ in request.keys], peer=self.info)

    async def call(self, method: object, request: Message) -> Message:
        return await RpcClient(self.host).call(self.node.peer_id, method, request, timeout=3.0)

    async def store(self, *items: StoreItem) -> list[bool]:
        return list((await self.call(STORE, store_request(items, pb.NodeInfo()))).store_ok)

    async def find(self, *keys: DhtId | bytes) -> list[pb.FindResult]:
        raw = [key if isinstance(key, bytes) else key.to_bytes() for key in keys]
        return list((await self.call(FIND, pb.FindRequest(keys=raw))).results)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with swarm() as nodes:
        yield Peer(nodes, await nodes.start())


async def test_a_ping_tells_who_and_when(autojump_clock: MockClock, peer: Peer) -> None:
    await trio.sleep(5)
    answer = await peer.call(PING, pb.PingRequest())
    assert answer == pb.PingResponse(
        peer=pb.NodeInfo(node_id=peer.node.node_id.to_bytes()), dht_time=START + 5, available=False
    )
    assert peer.node.neighbours() == []


async def test_a_ping_introduces_its_sender(autojump_clock: MockClock, peer: Peer) -> None:
    answer = await peer.call(PING, pb.PingRequest(peer=peer.info))
    assert not answer.available
    assert peer.pings == []
    assert peer.node.neighbours() == [Contact(peer.node_id, peer.host.peer_id)]


async def test_asked_to_validate_the_node_calls_back(autojump_clock: MockClock, peer: Peer) -> None:
    answer = await peer.call(PING, pb.PingRequest(peer=peer.info, validate=True))
    assert answer.available
    assert peer.pings == [pb.PingRequest(peer=pb.NodeInfo(node_id=peer.node.node_id.to_bytes()))]
    assert peer.node.neighbours() == [Contact(peer.node_id, peer.host.peer_id)]


async def test_a_caller_that_cannot_be_called_back_is_told_so_in_time(
    autojump_clock: MockClock, peer: Peer
) -> None:
    peer.pong = None
    started = trio.current_time()
    answer = await peer.call(PING, pb.PingRequest(peer=peer.info, validate=True))
    assert not answer.available
    assert trio.current_time() - started < defaults.DHT_CALL_SECONDS
    assert peer.node.neighbours() == []


async def test_a_caller_is_called_back_once_at_a_time(autojump_clock: MockClock, peer: Peer) -> None:
    peer.pong = None
    request = pb.PingRequest(peer=peer.info, validate=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.call, PING, request)
        await trio.sleep(0.1)
        started = trio.current_time()
        assert not (await peer.call(PING, request)).available
        assert trio.current_time() == started
    assert len(peer.pings) == 1


async def test_silent_callers_do_not_keep_a_node_from_its_own_calls(
    autojump_clock: MockClock, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "DHT_CALL_BACKS", 3)
    callers = [Peer(peer.swarm, peer.node, node_id=100 + n) for n in range(4)]
    async with trio.open_nursery() as nursery:
        for caller in callers:
            caller.pong = None
            nursery.start_soon(caller.call, PING, pb.PingRequest(peer=caller.info, validate=True))
        await trio.sleep(0.1)
        assert [len(caller.pings) for caller in callers].count(1) == 3
        assert await peer.node.ping(peer.host.peer_id) < 0.1


async def test_a_caller_that_gives_another_node_id_when_called_back_is_not_available(
    autojump_clock: MockClock, peer: Peer
) -> None:
    peer.pong = pb.PingResponse(peer=pb.NodeInfo(node_id=b"\x05" * 20))
    answer = await peer.call(PING, pb.PingRequest(peer=peer.info, validate=True))
    assert not answer.available
    assert Contact(peer.node_id, peer.host.peer_id) not in peer.node.neighbours()


async def test_a_client_that_asks_to_validate_is_not_called(autojump_clock: MockClock, peer: Peer) -> None:
    answer = await peer.call(PING, pb.PingRequest(validate=True))
    assert not answer.available
    assert peer.pings == []


@pytest.mark.parametrize(
    ("offset", "refused"),
    [(0.0, False), (3.0, False), (-3.0, False), (3.1, True), (-3.1, True), (math.nan, True)],
)
async def test_clocks_are_compared_when_joining(
    autojump_clock: MockClock, peer: Peer, offset: float, refused: bool
) -> None:
    peer.pong = pb.PingResponse(peer=peer.info, dht_time=START + offset, available=True)
    (result,) = await peer.node.bootstrap([peer.host.peer_id])
    assert isinstance(result.error, ClockSkew) is refused
    assert result.ok is not refused
    assert (peer.node.neighbours() == []) is refused
    if refused and not math.isnan(offset):
        assert result.error.seconds == pytest.approx(offset, abs=0.01)


@pytest.mark.parametrize("offset", [2.5, -2.5])
async def test_a_check_tells_how_far_the_clock_is_ahead(
    autojump_clock: MockClock, peer: Peer, offset: float
) -> None:
    peer.pong = pb.PingResponse(peer=peer.info, dht_time=START + offset, available=True)
    assert (await peer.node.check(peer.host.peer_id)).ahead == pytest.approx(offset, abs=0.01)


async def test_a_peer_that_tells_no_time_is_trusted(autojump_clock: MockClock, peer: Peer) -> None:
    peer.pong = pb.PingResponse(peer=peer.info, available=True)
    assert (await peer.node.check(peer.host.peer_id)).ahead is None
    (result,) = await peer.node.bootstrap([peer.host.peer_id])
    assert result.ok


async def test_a_peer_that_cannot_call_us_back_is_named_and_still_used(
    autojump_clock: MockClock, peer: Peer
) -> None:
    peer.pong = pb.PingResponse(peer=peer.info, dht_time=START)
    (result,) = await peer.node.bootstrap([peer.host.peer_id])
    assert isinstance(result.error, CallBackFailed)
    assert [ping.validate for ping in peer.pings] == [True]
    assert peer.node.neighbours() == [Contact(peer.node_id, peer.host.peer_id)]


async def test_values_and_subkeys_are_stored_and_found(autojump_clock: MockClock, peer: Peer) -> None:
    other = DhtId.of("other")
    assert await peer.store(
        StoreItem.of(KEY, None, pack("v"), LATER),
        StoreItem.of(KEY, None, pack("v"), LATER),
        StoreItem.of(other, "sub", pack(1), LATER),
        StoreItem.of(other, b"sub", pack(2), LATER + 1),
        StoreItem.of(other, "sub", pack(0), LATER - 1),
    ) == [True, False, True, True, False]
    regular, both, nothing = await peer.find(KEY, other, DhtId(0))
    assert (regular.type, regular.value, regular.expiration_time) == (pb.FOUND_REGULAR, pack("v"), LATER)
    assert (both.type, both.expiration_time) == (pb.FOUND_DICTIONARY, LATER + 1)
    assert unpack(both.value) == dictionary([("sub", pack(1), LATER), (b"sub", pack(2), LATER + 1)])
    assert nothing == pb.FindResult()


async def test_a_whole_dictionary_is_stored_entry_by_entry(autojump_clock: MockClock, peer: Peer) -> None:
    record = dictionary([("a", pack(1), LATER), ("b", pack(2), LATER + 1)])
    assert await peer.store(StoreItem.of_record(KEY, record)) == [True]
    assert await peer.store(StoreItem.of_record(KEY, record)) == [False]
    (found,) = await peer.find(KEY)
    assert unpack(found.value) == record


async def test_the_cache_is_separate_and_the_later_of_both_is_found(
    autojump_clock: MockClock, peer: Peer
) -> None:
    cached = StoreItem(KEY, pack(None), pack("cached"), LATER + 5, in_cache=True)
    assert await peer.store(cached, StoreItem.of(KEY, None, pack("stored"), LATER)) == [True, True]
    assert (await peer.find(KEY))[0].value == pack("cached")
    assert await peer.store(StoreItem.of(KEY, None, pack("stored"), LATER + 6)) == [True]
    assert (await peer.find(KEY))[0].value == pack("stored")


async def test_expired_records_are_neither_accepted_nor_found(autojump_clock: MockClock, peer: Peer) -> None:
    assert await peer.store(
        StoreItem.of(KEY, None, b"v", START - 0.1), StoreItem.of(KEY, None, b"v", math.nan)
    ) == [False, False]
    assert await peer.store(StoreItem.of(KEY, None, pack(1), START + 10)) == [True]
    await trio.sleep(11)
    assert await peer.find(KEY) == [pb.FindResult()]


async def test_senders_of_stores_and_finds_become_neighbours_unless_clients(
    autojump_clock: MockClock, peer: Peer
) -> None:
    await peer.call(FIND, pb.FindRequest())
    await peer.call(STORE, pb.StoreRequest())
    assert peer.node.neighbours() == []
    await peer.call(FIND, pb.FindRequest(peer=peer.info))
    assert peer.node.neighbours() == [Contact(peer.node_id, peer.host.peer_id)]


async def test_neighbours_are_nearest_first_without_the_requester(
    autojump_clock: MockClock, peer: Peer
) -> None:
    own = peer.node.node_id
    for n in range(1, 60):
        peer.node._contacts.heard_from(DhtId(own ^ n), peer_id(1000 + n))
    request = pb.FindRequest(
        keys=[peer.node.node_id.to_bytes()], peer=pb.NodeInfo(node_id=DhtId(own ^ 2).to_bytes())
    )
    (result,) = (await peer.call(FIND, request)).results
    expected = [1, *range(3, 22)]
    assert list(result.nearest_node_ids) == [DhtId(own ^ n).to_bytes() for n in expected]
    assert list(result.nearest_peer_ids) == [peer_id(1000 + n).raw for n in expected]


@pytest.mark.parametrize(
    ("method", "request_message", "text"),
    [
        (FIND, pb.FindRequest(keys=[bytes(21)]), "keys"),
        (FIND, pb.FindRequest(keys=[b"k"] * (defaults.DHT_MAX_FIND_KEYS + 1)), "keys"),
        (FIND, pb.FindRequest(peer=pb.NodeInfo(node_id=bytes(21))), "node_id"),
        (PING, pb.PingRequest(peer=pb.NodeInfo(node_id=bytes(21))), "node_id"),
        (STORE, pb.StoreRequest(peer=pb.NodeInfo(node_id=bytes(21))), "node_id"),
        (STORE, pb.StoreRequest(keys=[b"k"]), r"AssertionError\(\)"),
        (STORE, store_request([StoreItem(KEY, b"\xc1", b"v", LATER)], pb.NodeInfo()), "subkeys"),
        (STORE, store_request([StoreItem(KEY, b"\x91" * 4000, b"v", LATER)], pb.NodeInfo()), "subkeys"),
        (STORE, store_request([StoreItem(KEY, pack({}), b"v", LATER)], pb.NodeInfo()), "subkeys"),
        (STORE, store_request([StoreItem(KEY, b"", b"\xd4\x40" * 9999, LATER)], pb.NodeInfo()), "values"),
        (
            STORE,
            pb.StoreRequest(
                keys=[bytes(21)], subkeys=[b"\xc0"], values=[b"v"], expiration_time=[LATER], in_cache=[False]
            ),
            "keys",
        ),
    ],
)
async def test_malformed_requests_are_answered_with_an_error(
    autojump_clock: MockClock, peer: Peer, method: object, request_message: Message, text: str
) -> None:
    with pytest.raises(HandlerError, match=text):
        await peer.call(method, request_message)
    assert await peer.store(StoreItem.of(KEY, None, b"v", LATER)) == [True]  # it serves on


async def test_items_before_a_malformed_one_are_kept(autojump_clock: MockClock, peer: Peer) -> None:
    good = StoreItem.of(KEY, None, pack("v"), LATER)
    with pytest.raises(HandlerError):
        await peer.store(good, StoreItem(DhtId(9), b"\xc1", b"v", LATER))
    assert (await peer.find(KEY))[0].value == pack("v")


async def test_a_short_list_of_subkeys_ends_a_store_in_silence(autojump_clock: MockClock, peer: Peer) -> None:
    request = store_request([StoreItem.of(KEY, None, b"v", LATER)], pb.NodeInfo())
    del request.subkeys[:]
    assert list((await peer.call(STORE, request)).store_ok) == []


async def test_oversized_values_are_refused_one_by_one(autojump_clock: MockClock, peer: Peer) -> None:
    big = StoreItem.of(KEY, None, bytes(defaults.DHT_MAX_RECORD_BYTES), LATER)
    assert await peer.store(big, StoreItem.of(DhtId(5), None, b"v", LATER)) == [False, True]


async def test_an_answer_stays_within_the_message_limit(autojump_clock: MockClock, peer: Peer) -> None:
    contacts = peer.node._contacts
    for n in range(1, 60):
        contacts.heard_from(DhtId(n << 150), PeerId(b"\x00\x3e" + n.to_bytes(62, "big")))
    keys = [DhtId(n) for n in range(defaults.DHT_MAX_FIND_KEYS)]
    value = bytes(defaults.DHT_MAX_RECORD_BYTES - 100)
    for key in keys[:6]:
        assert await peer.store(StoreItem.of(key, None, value, LATER)) == [True]
    results = await peer.find(*keys)
    found = [result.type == pb.FOUND_REGULAR for result in results]
    assert found[:3] == [True] * 3
    assert sum(found) == 3
    assert all(len(result.nearest_node_ids) == 20 for result in results)


async def test_a_key_asked_for_twice_is_refused(autojump_clock: MockClock, peer: Peer) -> None:
    """A stranger would otherwise make one large record be packed hundreds of times."""
    with pytest.raises(HandlerError, match="twice"):
        await peer.find(KEY, DhtId(5), KEY)


async def test_a_peer_that_is_new_again_and_again_is_handed_records_once(
    autojump_clock: MockClock, peer: Peer
) -> None:
    assert await peer.store(StoreItem.of(KEY, None, pack("v"), LATER)) == [True]
    for n in range(5):
        info = pb.NodeInfo(node_id=DhtId(n + 1).to_bytes())
        await peer.call(PING, pb.PingRequest(peer=info))
        await trio.sleep(1)
    assert len(peer.stored) <= 1


async def test_a_newcomer_is_handed_the_records_it_should_keep(autojump_clock: MockClock, peer: Peer) -> None:
    record = dictionary([("a", pack(1), LATER), ("b", pack(2), LATER + 1)])
    items = [StoreItem.of(KEY, None, pack("v"), LATER), StoreItem.of_record(DhtId(3), record)]
    assert await peer.store(*items, StoreItem.of(DhtId(4), None, b"v", START + 1)) == [True, True, True]
    await trio.sleep(2)  # the last one expires
    await peer.call(PING, pb.PingRequest(peer=peer.info))
    await trio.sleep(1)
    (request,) = peer.stored
    assert request == store_request(items, pb.NodeInfo(node_id=peer.node.node_id.to_bytes()))
    await peer.call(PING, pb.PingRequest(peer=peer.info))
    await trio.sleep(1)
    assert len(peer.stored) == 1  # it is new only once


async def test_a_newcomer_gets_nothing_that_others_are_nearer_to(
    autojump_clock: MockClock, peer: Peer
) -> None:
    assert await peer.store(StoreItem.of(DhtId(0), None, pack("v"), LATER)) == [True]
    nearer = Peer(peer.swarm, peer.node, node_id=200)
    await nearer.call(PING, pb.PingRequest(peer=nearer.info))
    await trio.sleep(1)
    assert len(nearer.stored) == 1
    await peer.call(PING, pb.PingRequest(peer=peer.info))  # nearer still, but that is not this node's concern
    await trio.sleep(1)
    assert len(peer.node.neighbours()) == 2
    assert peer.stored == []


async def test_a_storing_peer_that_miscounts_is_dropped(autojump_clock: MockClock, peer: Peer) -> None:
    async def miscount(_request: pb.StoreRequest, _context: CallContext) -> pb.StoreResponse:
        await trio.lowlevel.checkpoint()
        return pb.StoreResponse(store_ok=[True, True], peer=peer.info)

    peer.server.unmount(STORE)
    peer.server.mount(STORE, miscount)
    await peer.call(PING, pb.PingRequest(peer=peer.info))
    assert len(peer.node.neighbours()) == 1
    with pytest.raises(RemoteError, match="store_ok"):
        await peer.node._remote.store(peer.host.peer_id, [StoreItem.of(KEY, None, b"v", LATER)])
    assert peer.node.neighbours() == []


def test_record_kinds() -> None:
    item = StoreItem.of_record(KEY, Regular(b"v", 1.0))
    assert (item.subkey, item.in_cache) == (b"\xc0", False)
