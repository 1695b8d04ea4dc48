"""Each message that a stock client once sent gets the answer that the stock server once gave.

The recordings are of Petals main with hivemind 1.1.12, two servers of four blocks each.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import torch
import trio
from expert_world import VECTORS, tiny_world

from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.hivemind.experts import methods, trees
from kwaainet_bridge.rpc.streams import parse
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo, ExpertUID
from kwaainet_bridge.wire.tensors import TensorJoiner, decode_tensor, encode_tensor, split_tensor

MESSAGES = VECTORS / "messages"
UNARY = {m.name.rpartition(".")[2]: m for m in (methods.RPC_INFO, methods.RPC_FORWARD, methods.RPC_BACKWARD)}

# What clients showed for the requests that were refused (messages/summary.txt).
ERRORS = {
    52: "KeyError('nope.0')",
    53: "RuntimeError('Remote peer does not serve nope.0')",
    54: "ValueError('not enough values to unpack (expected at least 2, got 0)')",
    57: "rpc_inference metadata must contain int max_length, got None",
    58: "Cannot allocate KV cache for 1000000000 tokens, max = 8192",
    59: "Could not allocate 134217728 bytes immediately: out of memory",
    60: "Maximum length exceeded: prefix 0 + current 2 exceeds pre-allocated maximum 1",
    61: "'adapter zzz not found'",
}


def files():
    return sorted(MESSAGES.glob("[0-9]*.bin"))


def number_of(path):
    return int(path.name[:3])


def method_of(path):
    return path.name[4:].split(".")[0]


def load(kind, path):
    return parse(kind, path.read_bytes(), path.name)


def first_block(uid):
    return int(uid.split(" ")[0].rpartition(".")[2]) if uid and not uid.startswith("nope") else 0


def joined(messages):
    joiner = TensorJoiner(1 << 26)
    parts = [part for message in messages for part in message.tensors]
    return [t for part in parts for t in joiner.feed(part)] + joiner.finish()


def assert_same_tensors(ours, recorded):
    ours, recorded = joined(ours), joined(recorded)
    assert [(t.dtype, list(t.size), t.compression) for t in ours] == [
        (t.dtype, list(t.size), t.compression) for t in recorded
    ]
    for mine, theirs in zip(ours, recorded, strict=True):
        a, b = decode_tensor(mine), decode_tensor(theirs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) if b.numel() else 0)


@pytest.fixture
async def world():
    # the recorded servers had room for 8192 tokens of one block, so for 2048 of all four
    async with tiny_world(cache_tokens=2048, max_length=8192) as world:
        yield world


def single_exchanges():
    """(request file, response file or None) of unary calls."""
    paths, found = files(), []
    for i, path in enumerate(paths):
        if ".request." in path.name and method_of(path) in ("rpc_info", "rpc_forward", "rpc_backward"):
            after = paths[i + 1] if i + 1 < len(paths) and ".response." in paths[i + 1].name else None
            found.append(pytest.param(path, after, id=path.name[:-12]))
    return found


@pytest.mark.parametrize(("request_file", "response_file"), single_exchanges())
async def test_unary_calls(world, request_file, response_file):
    name = method_of(request_file)
    method = UNARY[name]
    message = load(method.request, request_file)
    target = world.holder(first_block(message.uid))
    if response_file is None:
        with pytest.raises(HandlerError) as caught:
            await world.client.call(target, method, message, timeout=30)
        assert caught.value.text == ERRORS[number_of(request_file)]
        return
    response = await world.client.call(target, method, message, timeout=30)
    if name == "rpc_info":
        ours = msgpack.unpack(response.serialized_info)
        recorded = msgpack.unpack(load(ExpertInfo, response_file).serialized_info)
        assert ours.pop("version")
        recorded.pop("version")
        assert list(ours)[-1] == trees.KEY
        del ours[trees.KEY]  # ours alone: stock clients pass over it
        assert ours == recorded
        assert list(ours) == list(recorded)
    else:
        assert_same_tensors([response], [load(ExpertResponse, response_file)])


@pytest.mark.parametrize(
    ("method", "tail", "inputs"),
    [(methods.RPC_FORWARD_STREAM, 46, 1), (methods.RPC_BACKWARD_STREAM, 50, 2)],
    ids=["forward", "backward"],
)
async def test_streamed_calls(world, method, tail, inputs):
    """The recorded last request with its large tensors made anew (the recording leaves out 1 MB messages)."""
    last = load(ExpertRequest, next(MESSAGES.glob(f"{tail:03}-*.request.bin")))
    tensors = [torch.randn(34, 128, 64, generator=torch.Generator().manual_seed(i)) for i in range(inputs)]
    target = world.holder(first_block(last.uid))
    async with world.client.stream(target, method, open_timeout=5) as call:
        for tensor in tensors:
            for part in split_tensor(encode_tensor(tensor), 1 << 20):
                await call.send(ExpertRequest(uid=last.uid, metadata=last.metadata, tensors=[part]))
        await call.send(last)
        await call.end()
        responses = [r async for r in call]
    engine = world.servers[target].span.engine
    if inputs == 1:
        expected = await engine.forward(*tensors, range(1))
    else:
        expected, _ = await engine.backward(*tensors, range(1))
    torch.testing.assert_close(decode_tensor(joined(responses)[0]), expected)


async def test_streamed_uid_must_not_change(world):
    last = load(ExpertRequest, MESSAGES / "046-rpc_forward_stream.request.bin")
    async with world.client.stream(world.holder(0), methods.RPC_FORWARD_STREAM, open_timeout=5) as call:
        await call.send(last)
        await call.send(ExpertRequest(uid=f"{last.uid} other", tensors=last.tensors))
        with pytest.raises(HandlerError, match="Block uids differ in one request"):
            await call.receive(timeout=5)


async def test_inference_sessions(world):
    """All recorded steps in their order: batches, prompts, reordering, no tokens, and the farewell."""
    paths = [p for p in files() if method_of(p) == "rpc_inference" and number_of(p) <= 44]
    async with AsyncExitStack() as stack:
        open_calls = {}
        farewells = 0
        for i, path in enumerate(paths):
            if ".response." in path.name:
                continue
            message = load(ExpertRequest, path)
            if not message.tensors:
                # which session it ends is not in the message; both end here, one after the other
                call = open_calls.pop(next(iter(open_calls)))
                await call.send(message)
                await call.end()
                with pytest.raises(trio.EndOfChannel):
                    await call.receive(timeout=5)
                farewells += 1
                continue
            session = msgpack.unpack(message.metadata)["session_id"]
            if session not in open_calls:
                target = world.holder(first_block(message.uid))
                open_calls[session] = await stack.enter_async_context(
                    world.client.stream(target, methods.RPC_INFERENCE, open_timeout=5)
                )
            await open_calls[session].send(message)
            response = await open_calls[session].receive(timeout=30)
            assert_same_tensors([response], [load(ExpertResponse, paths[i + 1])])
        assert farewells == 4
    assert [s.open_sessions for s in world.servers.values()] == [0, 0]


@pytest.mark.parametrize("number", [57, 58, 59, 60, 61])
async def test_refused_sessions(world, number):
    path = next(MESSAGES.glob(f"{number:03}-*.request.bin"))
    message = load(ExpertRequest, path)
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(message)
        with pytest.raises(HandlerError) as caught:
            await call.receive(timeout=10)
    assert caught.value.text == ERRORS[number]


async def test_session_without_ids(world):
    message = load(ExpertRequest, MESSAGES / "062-rpc_inference.request.bin")
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(message)
        recorded = load(ExpertResponse, MESSAGES / "063-rpc_inference.response.bin")
        assert_same_tensors([await call.receive(timeout=10)], [recorded])


async def test_push_to_no_session_is_ignored(world):
    message = load(ExpertRequest, MESSAGES / "055-rpc_push.request.bin")
    response = await world.client.call(world.holder(0), methods.RPC_PUSH, message, timeout=10)
    assert b"".join(response.parts()) == (MESSAGES / "056-rpc_push.response.bin").read_bytes()


async def test_info_of_nothing_tells_the_state_only(world):
    response = await world.client.call(world.holder(0), methods.RPC_INFO, ExpertUID(uid=""), timeout=10)
    assert set(msgpack.unpack(response.serialized_info)) == {
        "version",
        "dht_client_mode",
        "cache_tokens_available",
        trees.KEY,
    }
