"""Calls between one of our hosts and a stock Hivemind 1.1.12 peer with its Go daemon, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from child_processes import PeerError
from conformance_methods import (
    BLOB,
    COUNT_STREAM,
    DEAF_STREAM,
    ECHO,
    ECHO_STREAM,
    ENDLESS_STREAM,
    FAIL,
    FAIL_STREAM,
    NUMBER_STREAM,
    UNSERVED,
    UNSERVED_STREAM,
    WAIT,
    Handlers,
    request,
    response,
    size_of,
)
from stock_swarm import StockPeer

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    DeadlineExceeded,
    HandlerError,
    NetworkError,
    ProtocolNotSupported,
)
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.rpc.client import ClientStream
from kwaainet_bridge.rpc.method import StreamMethod
from kwaainet_bridge.wire import envelope
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

SIX_MEBIBYTES = 6 * defaults.MIB  # more than any unary message and than a stream's window
MANY = 300


@dataclass
class Ours:
    """One of our hosts, connected to a stock peer."""

    host: Host
    stock: StockPeer

    def __post_init__(self) -> None:
        self.client = RpcClient(self.host)
        self.handlers = Handlers()
        self.handlers.mount(RpcServer(self.host))
        self.peer = PeerId.parse(self.stock.id)

    @property
    def id(self) -> str:
        return str(self.host.peer_id)

    async def call(self, method, *, size=0, uid="", timeout=20.0) -> int:
        return size_of(await self.client.call(self.peer, method, request(size, uid), timeout=timeout))

    @asynccontextmanager
    async def stream(
        self, method: StreamMethod[ExpertRequest, ExpertResponse]
    ) -> AsyncIterator[ClientStream[ExpertRequest, ExpertResponse]]:
        with trio.fail_after(30):
            async with self.client.stream(self.peer, method, open_timeout=10) as stream:
                yield stream

    async def talk(self, method, sizes, *, uid="") -> list[int]:
        """Send all requests and the end, while receiving all responses."""
        received: list[int] = []
        failure: HandlerError | None = None
        async with self.stream(method) as stream, trio.open_nursery() as nursery:

            async def feed() -> None:
                for size in sizes:
                    await stream.send(request(size, uid))
                await stream.end()

            nursery.start_soon(feed)
            try:
                received = [size_of(item) async for item in stream]
            except HandlerError as e:
                failure = e  # raised here it would be in the nursery's group
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return received

    async def called(self, do: str, **arguments):
        """Make the stock peer call us."""
        return await self.stock.driver.aask(do, peer=self.id, **arguments)


@asynccontextmanager
async def connected(stock: StockPeer) -> AsyncIterator[Ours]:
    config = HostConfig(identity=Identity.generate("ed25519"), listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_host(config) as host:
        await host.connect(stock.address)
        yield Ours(host, stock)


@pytest.fixture
async def ours(stock_peer: StockPeer) -> AsyncIterator[Ours]:
    """We dialled the stock peer."""
    async with connected(stock_peer) as ours:
        yield ours


def largest_unary(peer: PeerId) -> int:
    """The payload that makes an ``rpc_echo`` to this peer exactly as long as unary messages may be."""

    def excess(size: int) -> int:
        call = envelope.encode_call(bytes(16), peer.raw, ECHO.name, request(size).SerializeToString())
        (body,) = envelope.DelimitedDecoder(2 * defaults.MAX_UNARY_BYTES).feed(call)
        return len(body) - defaults.MAX_UNARY_BYTES

    size = defaults.MAX_UNARY_BYTES - excess(defaults.MAX_UNARY_BYTES)
    assert excess(size) == 0
    return size


# --- we call: unary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 1_000_000])
async def test_we_call_unary(ours: Ours, size: int):
    assert await ours.call(ECHO, size=size) == size


async def test_our_largest_request_is_the_largest_the_stock_peer_takes(ours: Ours):
    size = largest_unary(ours.peer)
    assert await ours.call(ECHO, size=size) == size
    with pytest.raises(ValueError, match="streaming"):
        await ours.call(ECHO, size=size + 1)


async def test_the_stock_peers_largest_response_arrives(ours: Ours):
    size = defaults.MAX_UNARY_BYTES - 100
    assert await ours.call(BLOB, uid=str(size)) == size


async def test_too_large_a_response_of_the_stock_peer_never_comes(ours: Ours):
    """A stock peer breaks while it builds the error, so only the deadline ends the call; the next one is fine."""
    with pytest.raises(DeadlineExceeded, match="rpc_blob"):
        await ours.call(BLOB, uid=str(defaults.MAX_UNARY_BYTES + 1), timeout=1)
    assert await ours.call(ECHO, size=1) == 1


@pytest.mark.parametrize("kind", ["ValueError", "KeyError"])
async def test_the_stock_peers_unary_error_text(ours: Ours, kind: str):
    with pytest.raises(HandlerError) as caught:
        await ours.call(FAIL, uid=kind)
    assert caught.value.text == f"{kind}('boom')"


async def test_our_deadline_cancels_the_stock_handler(ours: Ours):
    with pytest.raises(DeadlineExceeded, match="rpc_wait"):
        await ours.call(WAIT, timeout=0.5)
    await ours.stock.driver.aevent("started", method=WAIT.name)
    await ours.stock.driver.aevent("cancelled", method=WAIT.name)


async def test_our_cancellation_cancels_the_stock_handler(ours: Ours):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.call, WAIT)
        await ours.stock.driver.aevent("started", method=WAIT.name)
        nursery.cancel_scope.cancel()
    await ours.stock.driver.aevent("cancelled", method=WAIT.name)


async def test_we_call_what_the_stock_peer_does_not_serve(ours: Ours):
    with pytest.raises(ProtocolNotSupported, match="rpc_unserved"):
        await ours.call(UNSERVED)
    with pytest.raises(ProtocolNotSupported, match="rpc_unserved"):
        async with ours.stream(UNSERVED_STREAM):
            pass


async def test_we_make_a_hundred_calls_at_once(ours: Ours):
    answers: dict[int, int] = {}

    async def call(size: int) -> None:
        answers[size] = await ours.call(ECHO, size=size)

    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(call, 997 * n)
    assert answers == {997 * n: 997 * n for n in range(100)}


# --- we call: streaming --------------------------------------------------------------------------------------


async def test_we_stream_many_messages(ours: Ours):
    assert await ours.talk(ECHO_STREAM, range(MANY)) == list(range(MANY))


async def test_we_stream_large_messages(ours: Ours):
    assert await ours.talk(ECHO_STREAM, [SIX_MEBIBYTES, 0, SIX_MEBIBYTES]) == [
        SIX_MEBIBYTES,
        0,
        SIX_MEBIBYTES,
    ]


async def test_we_stream_in_lockstep(ours: Ours):
    async with ours.stream(ECHO_STREAM) as stream:
        for size in (5, 0, 100_000):
            await stream.send(request(size))
            assert size_of(await stream.receive()) == size
        await stream.end()
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()


async def test_the_stock_peers_streaming_error_text(ours: Ours):
    async with ours.stream(FAIL_STREAM) as stream:
        await stream.send(request(7))
        assert size_of(await stream.receive()) == 7
        with pytest.raises(HandlerError) as caught:
            await stream.receive()
    assert caught.value.text == "'boom'"


async def test_one_request_many_responses_from_the_stock_peer(ours: Ours):
    assert await ours.talk(COUNT_STREAM, [0], uid="50") == list(range(50))


async def test_many_requests_one_response_from_the_stock_peer(ours: Ours):
    assert await ours.talk(NUMBER_STREAM, range(40)) == [40]


async def test_two_requests_where_the_stock_peer_wants_one(ours: Ours):
    with pytest.raises(HandlerError, match="exactly one item"):
        await ours.talk(COUNT_STREAM, [0, 1], uid="2")


async def test_our_leaving_cancels_a_stock_handler_that_does_not_read(ours: Ours):
    async with ours.stream(DEAF_STREAM) as stream:
        await stream.send(request(1))
        await stream.send(request(2))
        await ours.stock.driver.aevent("started", method=DEAF_STREAM.name)
    await ours.stock.driver.aevent("cancelled", method=DEAF_STREAM.name)


async def test_our_leaving_cancels_a_stock_handler_that_writes_for_ever(ours: Ours):
    async with ours.stream(ENDLESS_STREAM) as stream:
        for _ in range(50):
            assert size_of(await stream.receive()) == 1000
    for name in ("started", "cancelled"):  # the first is not to be taken for that of the next test's call
        await ours.stock.driver.aevent(name, method=ENDLESS_STREAM.name)


async def test_our_cancellation_cancels_a_stock_stream(ours: Ours):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.talk, ENDLESS_STREAM, [])
        await ours.stock.driver.aevent("started", method=ENDLESS_STREAM.name)
        nursery.cancel_scope.cancel()
    await ours.stock.driver.aevent("cancelled", method=ENDLESS_STREAM.name)


async def test_a_killed_stock_peer_ends_our_calls(doomed_peer: StockPeer):
    """Killed without warning while it serves a unary and a streaming call: both fail, well before any deadline."""
    failed: list[NetworkError] = []

    async with connected(doomed_peer) as ours:

        async def call() -> None:
            with pytest.raises(NetworkError) as caught:
                await ours.call(WAIT, timeout=60)
            failed.append(caught.value)

        async def stream() -> None:
            async with ours.stream(ECHO_STREAM) as stream:
                await stream.send(request(3))
                assert size_of(await stream.receive()) == 3
                streaming.set()
                with pytest.raises(trio.EndOfChannel):  # no frame was cut
                    await stream.receive()

        streaming = trio.Event()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                nursery.start_soon(stream)
                await doomed_peer.driver.aevent("started", method=WAIT.name)
                await streaming.wait()
                await trio.to_thread.run_sync(doomed_peer.driver.kill)
    assert not isinstance(failed[0], DeadlineExceeded)


# --- we serve: unary -----------------------------------------------------------------------------------------


async def test_the_stock_peer_dials_us(stock_peer: StockPeer):
    config = HostConfig(identity=Identity.generate("ed25519"), listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_host(config) as host:
        ours = Ours(host, stock_peer)
        assert await stock_peer.driver.aask("connect", address=host.addresses()[0]) == ours.id
        assert await ours.called("unary", method="rpc_echo", size=12) == 12
        assert await ours.call(ECHO, size=13) == 13  # over the connection that it opened


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 1_000_000])
async def test_we_serve_unary(ours: Ours, size: int):
    assert await ours.called("unary", method="rpc_echo", size=size) == size


async def test_the_stock_peers_largest_request_is_served(ours: Ours):
    size = largest_unary(ours.host.peer_id)
    assert await ours.called("unary", method="rpc_echo", size=size, timeout=20) == size


async def test_too_large_a_response_of_ours_is_an_error_at_the_stock_peer(ours: Ours):
    with pytest.raises(PeerError, match="message size limit") as caught:
        await ours.called("unary", method="rpc_blob", uid=str(defaults.MAX_UNARY_BYTES), timeout=20)
    assert caught.value.kind == "P2PHandlerError"


@pytest.mark.parametrize("kind", ["ValueError", "KeyError"])
async def test_our_unary_error_text_at_the_stock_peer(ours: Ours, kind: str):
    with pytest.raises(PeerError) as caught:
        await ours.called("unary", method="rpc_fail", uid=kind)
    assert str(caught.value) == f"{kind}('boom')"
    assert caught.value.kind == "P2PHandlerError"


async def test_the_stock_peers_deadline_cancels_our_handler(ours: Ours):
    with pytest.raises(PeerError) as caught:
        await ours.called("unary", method="rpc_wait", timeout=0.5)
    assert caught.value.kind == "TimeoutError"
    await ours.handlers.event("cancelled", WAIT.name)


async def test_the_stock_peers_cancellation_cancels_our_handler(ours: Ours):
    number, answer = ours.stock.driver.begin("unary", peer=ours.id, method="rpc_wait")
    await ours.handlers.event("started", WAIT.name)
    await ours.stock.driver.aask("cancel", call=number)
    await ours.handlers.event("cancelled", WAIT.name)
    assert answer.exception(timeout=0) is not None


async def test_the_stock_peer_makes_a_hundred_calls_at_once(ours: Ours):
    begun = [
        ours.stock.driver.begin("unary", peer=ours.id, method="rpc_echo", size=997 * n)[1] for n in range(100)
    ]
    answers = [await trio.to_thread.run_sync(answer.result, 30) for answer in begun]
    assert answers == [997 * n for n in range(100)]


# --- we serve: streaming -------------------------------------------------------------------------------------


async def test_we_serve_many_messages(ours: Ours):
    sizes = list(range(MANY))
    assert await ours.called("stream", method="rpc_echo_stream", sizes=sizes) == sizes


async def test_we_serve_large_messages(ours: Ours):
    sizes = [SIX_MEBIBYTES, 0, SIX_MEBIBYTES]
    assert await ours.called("stream", method="rpc_echo_stream", sizes=sizes) == sizes


async def test_our_streaming_error_text_at_the_stock_peer(ours: Ours):
    with pytest.raises(PeerError) as caught:
        await ours.called("stream", method="rpc_fail_stream", sizes=[1, 2, 3])
    expected = f"Failed to call handler `{FAIL_STREAM.name}` at {ours.id}: 'boom'"
    assert (caught.value.kind, str(caught.value)) == ("P2PHandlerError", expected)


async def test_our_many_responses_to_one_request(ours: Ours):
    answer = await ours.called("stream", method="rpc_count_stream", sizes=[0], uid="50")
    assert answer == list(range(50))


async def test_our_one_response_to_many_requests(ours: Ours):
    assert await ours.called("single", method="rpc_number_stream", sizes=list(range(40))) == 40


async def test_the_stock_peers_leaving_cancels_our_handler_that_does_not_read(ours: Ours):
    sizes = list(range(defaults.READ_AHEAD_MESSAGES))  # with more, neither side sees that the other left
    number, _ = ours.stock.driver.begin("stream", peer=ours.id, method="rpc_deaf_stream", sizes=sizes)
    await ours.handlers.event("started", DEAF_STREAM.name)
    await ours.stock.driver.aask("cancel", call=number)
    await ours.handlers.event("cancelled", DEAF_STREAM.name)


async def test_the_stock_peers_leaving_cancels_our_handler_that_writes_for_ever(ours: Ours):
    answer = await ours.called("stream", method="rpc_endless_stream", sizes=[], take=50)
    assert answer == [1000] * 50
    await ours.handlers.event("cancelled", ENDLESS_STREAM.name)


async def test_the_stock_peer_leaves_between_requests(ours: Ours):
    """Its requests never end, it takes what it wants and closes; our handler waits for the next request."""
    answer = await ours.called("stream", method="rpc_echo_stream", sizes=[1, 2, 3], take=3, end=False)
    assert answer == [1, 2, 3]
    assert await ours.called("unary", method="rpc_echo", size=1) == 1


async def test_a_handler_of_ours_that_ends_first_breaks_no_stock_caller(ours: Ours):
    """200 calls whose handler returns while the caller still writes its end-of-stream: none fails."""
    for _ in range(200):
        answer = await ours.called("stream", method="rpc_count_stream", sizes=[0], uid="1")
        assert answer == [0]


async def test_a_killed_stock_peer_cancels_our_handlers(doomed_peer: StockPeer):
    async with connected(doomed_peer) as ours:
        doomed_peer.driver.begin("unary", peer=ours.id, method="rpc_wait")
        doomed_peer.driver.begin("stream", peer=ours.id, method="rpc_deaf_stream", sizes=[1])
        await ours.handlers.event("started", WAIT.name)
        await ours.handlers.event("started", DEAF_STREAM.name)
        await trio.to_thread.run_sync(doomed_peer.driver.kill)
        await ours.handlers.event("cancelled", WAIT.name)
        await ours.handlers.event("cancelled", DEAF_STREAM.name)


def test_messages_are_told_apart_by_size():
    assert [size_of(response(n)) for n in (0, 1, 5000)] == [0, 1, 5000]
    with pytest.raises(AssertionError, match="changed"):
        size_of(ExpertResponse(metadata=b"x"))
