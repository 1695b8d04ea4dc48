"""The protocols of a node together: what is mounted, what is made when, and how it ends."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from kwaai_world import MODEL, World, bare_server, peer, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import (
    CapacityDenied,
    HandlerError,
    ProtocolNotSupported,
    RemoteError,
    WarmingUp,
)
from kwaainet_bridge.kwaai import methods
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer, unary
from kwaainet_bridge.wire.kwaai_hello import Hello
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, InferenceResponse, ResponseType

MUX = MuxEndpoint(url="http://127.0.0.1:1", paths=["/x"])


@pytest.fixture
async def model():
    engine = await Engine.load(
        EngineConfig(str(MODEL), blocks=range(4), threads=1, max_length=64, cache_tokens=512)
    )
    yield ServedModel(engine)
    await engine.aclose()


async def test_hello(caplog):
    caplog.set_level("DEBUG", "kwaainet_bridge.kwaai.hello")
    async with bare_server(KwaaiProtocols()) as (world, _, address):
        assert await world.client().hello(address, "hi \x1b[31m") == "ok"
        assert "says 'hi \\x1b[31m'" in caplog.text
        longest = "x" * defaults.MAX_HELLO_BYTES
        assert await world.client().hello(address, longest) == "ok"
        assert longest not in caplog.text
        lax = unary(methods.HELLO.name, InferenceRequest, Hello)
        request = InferenceRequest.of_token_ids(1, 0, [1] * 2000)
        with pytest.raises(HandlerError, match="at most 4096 are accepted"):
            await RpcClient(world.host()).call(address, lax, request, timeout=5)


async def test_only_what_is_on_is_mounted():
    protocols = KwaaiProtocols(inference=False, lease=False, hello=False)
    async with bare_server(protocols) as (world, _, address):
        client = world.client()
        for call in (client.step_ids(address, 1, 0, [1]), client.lease(address), client.hello(address)):
            with pytest.raises(ProtocolNotSupported):
                await call


async def test_everything_is_unmounted_at_the_end():
    async def take(peer, message):
        pass

    async with trio.open_nursery() as nursery:
        world = World(MemoryNetwork(nursery))
        host = world.network.host(peer(1))
        from kwaainet_bridge.kwaai.server import serve_kwaai

        async with serve_kwaai(host, RpcServer(host), KwaaiProtocols(mux=MUX, tensor=take)):
            assert len(host._handlers) == 5
        assert host._handlers == {}
        nursery.cancel_scope.cancel()


async def test_nothing_is_made_before_it_is_needed(model):
    async with bare_server(KwaaiProtocols(mux=MUX)) as (world, server, address), server.serving(model):
        assert not {"_places", "_mux", "_tensors"} & server.__dict__.keys()
        assert server._inference is None
        assert await world.client().hello(address) == "ok"
        assert server._inference is None
        assert await server.drain(timeout=0) == 0


async def test_the_model_comes_and_goes(model):
    async with bare_server(KwaaiProtocols()) as (world, server, address):
        client = world.client()
        with pytest.raises(WarmingUp, match="model loading in background"):
            await client.step_ids(address, 1, 0, [1])
        answer = await RpcClient(world.host()).call(
            address, methods.INFERENCE, InferenceRequest.of_token_ids(7, 0, [1]), timeout=5
        )
        assert (answer.session_id, answer.shape, len(answer.data)) == (0, (), 0)
        async with server.serving(model) as served:
            assert served is server
            await client.step_ids(address, 1, 0, [1])
            assert server.open_sessions == 1
            with pytest.raises(ValueError, match="a model is served already"):
                async with server.serving(model):
                    pass
        assert model.engine.cache_bytes_left == model.engine.cache_bytes_total
        assert server.open_sessions == 0
        with pytest.raises(WarmingUp):
            await client.step_ids(address, 1, 0, [1])
        assert len(server._nursery.child_tasks) == 0


async def test_draining(model, monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_DRAIN_IDLE_SECONDS", 0.5)
    async with bare_server(KwaaiProtocols()) as (world, server, address), server.serving(model):
        client = world.client()
        await client.step_ids(address, 1, 0, [1])
        assert await server.drain(timeout=0) == 1
        with pytest.raises(HandlerError, match="shutting down and takes no new sessions"):
            await client.step_ids(address, 2, 0, [1])
        with pytest.raises(CapacityDenied):
            await client.lease(address)
        await client.step_ids(address, 1, 1, [1])  # what runs goes on
        with trio.fail_after(10):
            assert await server.drain() == 0


async def test_other_blocks_are_served_after_those_that_were_drained(model):
    async with bare_server(KwaaiProtocols()) as (world, server, address):
        client = world.client()
        async with server.serving(model):
            await client.step_ids(address, 1, 0, [1])
            await server.drain(timeout=0)
        async with server.serving(model):
            await client.lease(address)
            await client.step_ids(address, 2, 0, [1])
            assert server.open_sessions == 1


async def test_a_caller_that_leaves_frees_its_session(model):
    async with bare_server(KwaaiProtocols()) as (world, server, address), server.serving(model):
        client = world.client()
        await client.step_ids(address, 1, 0, [1])
        entered, release = trio.Event(), trio.Event()
        logits = model.engine._compute.run

        async def slow(work, *args):
            entered.set()
            await release.wait()
            return await logits(work, *args)

        model.engine._compute.run = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.step_ids, address, 1, 1, [1])
            await entered.wait()
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert server.open_sessions == 0
        assert model.engine.cache_bytes_left == model.engine.cache_bytes_total


async def test_all_protocols_share_the_cache_with_other_sessions():
    async with tiny_world(range(4), max_length=64, cache_tokens=640) as world:
        node = world.nodes[0]
        await world.client().step_ids(node.peer, 1, 0, [1])
        service = node.server._inference
        assert service.sessions.room() == 9
        async with node.model.engine.open_session(range(4), 9, 64):
            assert service.sessions.room() == 0
            with pytest.raises(CapacityDenied):
                await world.client().lease(node.peer)


# --- a client at servers that do not answer as they should


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((2, ResponseType.HIDDEN_STATES, (1, 3, 4)), "answered session 2, asked was 1"),
        ((1, ResponseType.HIDDEN_STATES, (1, 2, 4)), "hidden states of 2 tokens, asked were 3"),
        ((1, ResponseType.HIDDEN_STATES, (1, 3, 5)), r"answered shape \[1, 3, 5\], asked was \[1, 3, 4\]"),
    ],
)
async def test_answers_that_do_not_fit(answer, text):
    import torch

    session_id, kind, shape = answer

    async def lie(request, context):
        return InferenceResponse.of_values(session_id, kind, torch.zeros(shape))

    async with trio.open_nursery() as nursery:
        world = World(MemoryNetwork(nursery))
        RpcServer(world.network.host(peer(1))).mount(methods.INFERENCE, lie)
        client = KwaaiClient(RpcClient(world.host()))
        with pytest.raises(RemoteError, match=text):
            await client.step_hidden(peer(1), 1, 0, torch.zeros(1, 3, 4))
        nursery.cancel_scope.cancel()
