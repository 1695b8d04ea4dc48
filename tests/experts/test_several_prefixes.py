"""Blocks of several models on one host: whose request it is, and what one model's end leaves to the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch
import trio
import trio.testing
from expert_world import MODEL, peer

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import HandlerError, ProtocolNotSupported
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import block_uid
from kwaainet_bridge.hivemind.experts.server import ExpertCalls, ExpertServer
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertUID
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor

SERVER = peer(1)
FIRST, SECOND = range(2), range(4, 6)  # of one checkpoint, so that each computes something else


def request(prefix: str, blocks: range, tokens: int = 1, **metadata: object) -> ExpertRequest:
    torch.manual_seed(1)
    return ExpertRequest(
        uid=" ".join(block_uid(prefix, block) for block in blocks),
        tensors=[encode_tensor(torch.randn(1, tokens, 64)), encode_tensor(torch.empty(0))],
        metadata=msgpack.pack({"max_length": 8, **metadata}),
    )


class Host:
    def __init__(self, calls: ExpertCalls, client: RpcClient) -> None:
        self.calls, self.client = calls, client

    @asynccontextmanager
    async def serving(self, prefix: str, blocks: range, **settings: int) -> AsyncIterator[ExpertServer]:
        config = EngineConfig(str(MODEL), blocks, threads=1, **{"cache_tokens": 256, **settings})  # type: ignore[arg-type]
        engine = await Engine.load(config)
        try:
            async with self.calls.serving(ServedSpan(prefix, engine)) as server:
                yield server
        finally:
            await engine.aclose()

    def stream(self, method=methods.RPC_INFERENCE):
        return self.client.stream(SERVER, method, open_timeout=5)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        own = network.host(SERVER)
        yield Host(ExpertCalls(RpcServer(own), RpcClient(own)), RpcClient(network.host(peer(0))))
        nursery.cancel_scope.cancel()


async def alone(blocks: range, asked: ExpertRequest) -> torch.Tensor:
    engine = await Engine.load(EngineConfig(str(MODEL), blocks, threads=1, cache_tokens=256))
    try:
        return await engine.forward(decode_tensor(asked.tensors[0]), blocks)
    finally:
        await engine.aclose()


async def test_each_request_goes_to_the_model_that_it_names(host: Host) -> None:
    async with (
        host.serving("one", FIRST) as one,
        host.serving("two", SECOND) as two,
        AsyncExitStack() as stack,
    ):
        for prefix, blocks, server in (("one", FIRST, one), ("two", SECOND, two)):
            asked = request(prefix, blocks, 3)
            expected = await alone(blocks, asked)
            whole = await host.client.call(SERVER, methods.RPC_FORWARD, asked, timeout=10)
            async with host.stream(methods.RPC_FORWARD_STREAM) as call:
                await call.send(asked)
                await call.end()
                streamed = [answer async for answer in call]
            session = await stack.enter_async_context(host.stream())
            await session.send(asked)
            stepped = await session.receive(timeout=10)
            for answer in (whole, streamed[0], stepped):
                torch.testing.assert_close(decode_tensor(answer.tensors[0]), expected, rtol=1e-5, atol=1e-5)
            assert (server.counts.passes, server.counts.steps, server.open_sessions) == (2, 1, 1)
            info = await host.client.call(
                SERVER, methods.RPC_INFO, ExpertUID(uid=f"{prefix}.{blocks.start}"), timeout=10
            )
            assert "forward_schema" in msgpack.unpack(info.serialized_info)


async def test_about_no_model_the_tightest_cache_is_told(host: Host) -> None:
    async with host.serving("one", FIRST, cache_tokens=512), host.serving("two", SECOND, cache_tokens=64):
        info = await host.client.call(SERVER, methods.RPC_INFO, ExpertUID(uid=""), timeout=10)
        assert msgpack.unpack(info.serialized_info)["cache_tokens_available"] == 64 * len(SECOND)


@pytest.mark.parametrize("uid", ["three.0", "one.4", "one.0 two.4", "one.0 one.1 one.2", "", "one", ".0"])
async def test_what_nobody_serves_is_told_as_by_one_model(host: Host, uid: str) -> None:
    async with host.serving("one", FIRST), host.serving("two", SECOND):
        asked = request("one", FIRST)
        asked.uid = uid
        with pytest.raises(HandlerError, match="does not serve"):
            await host.client.call(SERVER, methods.RPC_FORWARD, asked, timeout=10)
        with pytest.raises(HandlerError, match="does not serve"):
            await host.client.call(
                SERVER,
                methods.RPC_PUSH,
                ExpertRequest(uid=uid, tensors=asked.tensors, metadata=msgpack.pack({"session_id": "s"})),
                timeout=10,
            )
        async with host.stream() as call:
            await call.send(asked)
            with pytest.raises(HandlerError, match="does not serve"):
                await call.receive(timeout=10)
        if uid:
            with pytest.raises(HandlerError, match="KeyError"):
                await host.client.call(SERVER, methods.RPC_INFO, ExpertUID(uid=uid + ".9"), timeout=10)


async def test_one_name_is_served_once(host: Host) -> None:
    async with host.serving("one", FIRST):
        with pytest.raises(ValueError, match="one are served already"):
            async with host.serving("one", SECOND):
                pass
        await host.client.call(SERVER, methods.RPC_FORWARD, request("one", FIRST), timeout=10)


async def test_the_end_of_one_model_is_not_the_others(host: Host) -> None:
    async with host.serving("one", FIRST) as one, host.stream() as call:
        await call.send(request("one", FIRST))
        await call.receive(timeout=10)
        async with AsyncExitStack() as stack:
            async with host.serving("two", SECOND):
                cut = await stack.enter_async_context(host.stream())
                await cut.send(request("two", SECOND))
                await cut.receive(timeout=10)
            with pytest.raises(HandlerError, match="serves these blocks no longer"):
                await cut.receive(timeout=10)
        async with host.stream() as late:
            await late.send(request("two", SECOND))
            with pytest.raises(HandlerError, match=r"does not serve two\.4"):
                await late.receive(timeout=10)
        await call.send(request("one", FIRST))
        await call.receive(timeout=10)
        assert one.open_sessions == 1
    with pytest.raises(ProtocolNotSupported):
        async with host.stream():
            pass


async def test_draining_one_model_waits_for_its_own_calls_only(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "CLOSE_GRACE_SECONDS", 60.0)
    async with host.serving("one", FIRST) as one, host.serving("two", SECOND) as two, host.stream() as call:
        await call.send(request("one", FIRST))
        await call.receive(timeout=10)
        with trio.fail_after(5):
            assert await two.drain() == 0
        async with host.stream() as late:
            await late.send(request("two", SECOND))
            with pytest.raises(HandlerError, match="takes no new sessions"):
                await late.receive(timeout=10)
        async with host.stream() as other:
            await other.send(request("one", FIRST))
            await other.receive(timeout=10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.drain)
            await trio.testing.wait_all_tasks_blocked()
            assert not one.inference.accepting
            await call.send(ExpertRequest())
            await call.end()
            assert [answer async for answer in call] == []
        assert one.open_sessions == 0


async def test_messages_may_be_as_large_as_the_largest_model_takes(host: Host) -> None:
    sizes = []
    mount = host.calls._rpc.mount_stream

    def noted(method, handler, *, max_message_bytes):
        if method is methods.RPC_INFERENCE:
            sizes.append(max_message_bytes)
        mount(method, handler, max_message_bytes=max_message_bytes)

    host.calls._rpc.mount_stream = noted  # type: ignore[method-assign]
    async with host.serving("one", FIRST, max_batch_tokens=64):
        async with host.serving("two", SECOND, max_batch_tokens=128), host.stream() as call:
            await call.send(request("one", FIRST))
            await call.receive(timeout=10)
        async with host.serving("two", SECOND, max_batch_tokens=32):
            pass
    small, large, again = sizes
    assert small == again < large
