"""What becomes of sessions whose blocks are served no longer, while the host goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch
import trio
import trio.testing
from expert_world import MODEL, PREFIX, peer

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import HandlerError, ProtocolNotSupported
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import block_uid
from kwaainet_bridge.hivemind.experts.server import ExpertServer, serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import encode_tensor

SERVER = peer(1)


def step(block: int) -> ExpertRequest:
    return ExpertRequest(
        uid=block_uid(PREFIX, block),
        tensors=[encode_tensor(torch.zeros(1, 1, 64))],
        metadata=msgpack.pack({"max_length": 8}),
    )


@pytest.fixture
async def hosts() -> AsyncIterator[tuple[MemoryHost, MemoryHost]]:
    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        yield network.host(SERVER), network.host(peer(0))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(host: MemoryHost, blocks: range, counts: ServingCounts) -> AsyncIterator[ExpertServer]:
    engine = await Engine.load(EngineConfig(str(MODEL), blocks, threads=1, cache_tokens=256))
    try:
        async with serve_span(
            ServedSpan(PREFIX, engine), RpcServer(host), RpcClient(host), counts=counts
        ) as server:
            yield server
    finally:
        await engine.aclose()


async def test_they_are_told_and_nothing_of_the_engine_is_kept(hosts: tuple[MemoryHost, MemoryHost]) -> None:
    host, caller = hosts
    client, counts = RpcClient(caller), ServingCounts()
    async with AsyncExitStack() as stack:
        async with serving(host, range(2), counts) as server:
            stream = client.stream(SERVER, methods.RPC_INFERENCE, open_timeout=5)
            call = await stack.enter_async_context(stream)
            await call.send(step(0))
            await call.receive(timeout=10)
            assert server.open_sessions == 1
            engine = weakref.ref(server.span.engine)
        assert server.open_sessions == 0
        with pytest.raises(HandlerError, match="serves these blocks no longer"):
            await call.receive(timeout=10)
    del server
    await trio.testing.wait_all_tasks_blocked()  # the handler has sent its answer
    gc.collect()
    assert engine() is None

    with pytest.raises(ProtocolNotSupported):
        async with client.stream(SERVER, methods.RPC_INFERENCE, open_timeout=5):
            pass
    async with (
        serving(host, range(2, 4), counts),
        client.stream(SERVER, methods.RPC_INFERENCE, open_timeout=5) as call,
    ):
        await call.send(step(2))
        await call.receive(timeout=10)
        assert counts.steps == 2


async def test_a_session_that_lasts_too_long_is_told_so(
    hosts: tuple[MemoryHost, MemoryHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "SESSION_TIMEOUT_SECONDS", 0.3)
    host, caller = hosts
    async with (
        serving(host, range(2), ServingCounts()),
        RpcClient(caller).stream(SERVER, methods.RPC_INFERENCE, open_timeout=5) as call,
    ):
        await call.send(step(0))
        await call.receive(timeout=10)
        with pytest.raises(HandlerError, match=r"lasted longer than 0\.3 s"):
            await call.receive(timeout=10)


async def test_a_request_that_is_still_being_sent_keeps_no_weights_in_memory(
    hosts: tuple[MemoryHost, MemoryHost],
) -> None:
    """The next blocks may need the room, and a peer may take three minutes for its request."""
    host, caller = hosts
    client = RpcClient(caller)
    async with AsyncExitStack() as stack:
        async with serving(host, range(2), ServingCounts()) as server:
            stream = client.stream(SERVER, methods.RPC_FORWARD_STREAM, open_timeout=5)
            call = await stack.enter_async_context(stream)
            await call.send(step(0))
            await trio.testing.wait_all_tasks_blocked()
            engine = server.span.engine
            held = [weakref.ref(engine._span), weakref.ref(engine._room.prefixes)]
            assert all(each() is not None for each in held)
        del server, engine
        gc.collect()
        assert [each() for each in held] == [None, None]
        await call.end()
        with pytest.raises(HandlerError):
            await call.receive(timeout=10)
