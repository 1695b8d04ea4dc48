"""Wrong requests: a text that says so for their sender, nothing for anybody else."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress

import pytest
import torch
import trio
import trio.testing
from expert_calls import DUMMY, NO_HYPOTHESES, hidden, request, step, uid
from expert_world import client_of, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import EngineError, HandlerError, StreamReset
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.rpc.streams import read_delimited
from kwaainet_bridge.wire import envelope, frames, msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import TensorMessage, encode_tensor

ALL = range(8)
DEEP = b"\x91" * 10_000 + b"\xc0"


@pytest.fixture
async def world():
    async with tiny_world(ALL, cache_tokens=256, max_length=128, max_batch_tokens=64) as world:
        yield world


async def refused(world, method, message):
    with pytest.raises(HandlerError) as caught:
        await world.client.call(world.holder(0), method, message, timeout=10)
    return caught.value.text


async def refused_session(world, *messages):
    """Send steps; all but the last are answered. Returns the text that the last one gets."""
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        for message in messages[:-1]:
            await call.send(message)
            await call.receive(timeout=10)
        await call.send(messages[-1])
        with pytest.raises(HandlerError) as caught:
            await call.receive(timeout=10)
        return caught.value.text


@pytest.fixture(autouse=True)
async def still_serves(world):
    """Whatever a test did, the server works on and holds no cache."""
    yield
    response = await world.client.call(
        world.holder(0), methods.RPC_FORWARD, request(ALL, hidden(), DUMMY), timeout=10
    )
    assert len(response.tensors) == 1
    server = world.servers[world.holder(0)]
    assert server.open_sessions == 0
    assert server.span.engine.cache_bytes_left == server.span.engine.cache_bytes_total


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tiny-llama-hf.8", "Remote peer does not serve tiny-llama-hf.8"),
        ("other.0", "Remote peer does not serve other.0"),
        ("", "Remote peer does not serve "),
        ("tiny-llama-hf.-1", "Remote peer does not serve tiny-llama-hf.-1"),
        ("tiny-llama-hf.²", "Remote peer does not serve tiny-llama-hf.²"),
        ("tiny-llama-hf.0 tiny-llama-hf.2", "must follow each other"),
        ("tiny-llama-hf.1 tiny-llama-hf.0", "must follow each other"),
        (" ".join(["tiny-llama-hf.0"] * 10_000), "names more blocks than are served"),
        (" " * 100_000, "names more blocks than are served"),
    ],
)
async def test_unknown_blocks(world, name, text):
    message = ExpertRequest(uid=name, tensors=[encode_tensor(hidden()), encode_tensor(DUMMY)])
    assert text in await refused(world, methods.RPC_FORWARD, message)


TENSORS = {
    "buffer shorter than its shape": TensorMessage(values=[bytes(12)], size=[1, 1, 64], dtype="float32"),
    "buffer longer than its shape": TensorMessage(values=[bytes(1024)], size=[1, 1, 64], dtype="float32"),
    "huge shape, no buffer": TensorMessage(values=[], size=[2**31, 2**31, 2**31], dtype="float32"),
    "unknown dtype": TensorMessage(values=[bytes(256)], size=[1, 1, 64], dtype="complex999"),
    "no dtype": TensorMessage(values=[bytes(256)], size=[1, 1, 64]),
    "lying compression: blockwise": TensorMessage(
        values=[bytes(256)], size=[1, 1, 64], dtype="float32", compression=CompressionType.BLOCKWISE_8BIT
    ),
    "lying compression: huge codebook": TensorMessage(
        values=[b"\xff" * 7 + b"\x7f" + bytes(64)],
        size=[1, 1, 64],
        dtype="float32",
        compression=CompressionType.UNIFORM_8BIT,
    ),
    "lying compression: halves": TensorMessage(
        values=[bytes(256)], size=[1, 1, 64], dtype="float32", compression=CompressionType.FLOAT16
    ),
    "unknown compression": TensorMessage(
        values=[bytes(256)], size=[1, 1, 64], dtype="float32", compression=77
    ),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("method", [methods.RPC_FORWARD, methods.RPC_BACKWARD], ids=["forward", "backward"])
async def test_tensors_that_lie(world, method, name):
    message = ExpertRequest(uid=uid(ALL), tensors=[TENSORS[name]] * 3)
    assert "RemoteError" in await refused(world, method, message)


@pytest.mark.parametrize("name", TENSORS)
async def test_tensors_that_lie_in_a_session(world, name):
    first = step(ALL, hidden(), max_length=16)
    lie = ExpertRequest(uid=uid(ALL), tensors=[TENSORS[name]])
    assert await refused_session(world, first, lie)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.zeros(1, 4, 64, dtype=torch.int64), "float"),
        (torch.zeros(1, 4, 63), "64"),
        (torch.zeros(4, 64), "batch"),
        (torch.zeros(0, 4, 64), "batch"),
        (torch.zeros(1, 65, 64), "Task size greater than max_batch_size (64)"),
    ],
    ids=["integers", "hidden size", "two dimensions", "no sequence", "too many tokens"],
)
async def test_wrong_hidden_states(world, inputs, text):
    assert text in await refused(world, methods.RPC_FORWARD, request(ALL, inputs, DUMMY))


@pytest.mark.parametrize(
    "prompts",
    [torch.zeros(3, 1, 2, 64), torch.zeros(8, 2, 2, 64), torch.zeros(8, 1, 2, 63), torch.zeros(8, 1, 5, 64)],
    ids=["blocks", "batch", "hidden size", "longer than the input"],
)
async def test_wrong_prompts(world, prompts):
    assert "ValueError" in await refused(world, methods.RPC_FORWARD, request(ALL, hidden(), prompts))


async def test_backward_needs_gradients_of_the_same_shape(world):
    text = await refused(world, methods.RPC_BACKWARD, request(ALL, hidden(), hidden(tokens=3), DUMMY))
    assert "ValueError" in text


@pytest.mark.parametrize(
    "metadata",
    [
        DEEP,
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        msgpack.pack([1]),
        msgpack.pack({"output_compression": (99,)}),
        msgpack.pack({"output_compression": (0, 0, 0)}),
        msgpack.pack({"output_compression": "x"}),
        msgpack.pack({"points": "many"}),
        msgpack.pack({"active_adapter": "nope"}),
        msgpack.pack({"args_structure": ()}),
        msgpack.pack({"args_structure": ((b"__T9", b"__T1"), {})}),
        msgpack.pack({"args_structure": ((b"__T" + b"9" * 5000, b"__T1"), {})}),
        msgpack.pack({"args_structure": ((None, None), {})}),
    ],
)
async def test_wrong_metadata(world, metadata):
    message = request(ALL, hidden(), DUMMY)
    message.metadata = metadata
    assert await refused(world, methods.RPC_FORWARD, message)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "must contain int max_length, got None"),
        ({"max_length": "12"}, "must contain int max_length, got '12'"),
        ({"max_length": True}, "must contain int max_length, got True"),
        ({"max_length": -1}, "Cannot allocate KV cache for -1 tokens, max = 128"),
        ({"max_length": 129}, "Cannot allocate KV cache for 129 tokens, max = 128"),
        ({"max_length": 2**63}, "Cannot allocate KV cache"),
        ({"max_length": 16, "active_adapter": "zzz"}, "'adapter zzz not found'"),
        ({"max_length": 16, "session_id": 7}, "session_id"),
        ({"max_length": 16, "step_id": [1]}, "step_id"),
        ({"max_length": 16, "alloc_timeout": "soon"}, "alloc_timeout"),
        ({"max_length": 16, "start_from_position": 1}, "position"),
        ({"max_length": 16, "start_from_position": -1}, "position"),
        ({"max_length": 16, "session_id": "x" * 129}, "session_id has 129 characters"),
        ({"max_length": 16, "step_id": "x" * 1_000_000}, "step_id has 1000000 characters"),
        ({"max_length": 16, "active_adapter": "x" * 1_000_000}, "xxx not found"),
    ],
)
async def test_wrong_session_settings(world, settings, text):
    assert text in await refused_session(world, step(ALL, hidden(), **settings))


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (
            step(ALL, hidden(tokens=13)),
            "Maximum length exceeded: prefix 4 + current 13 exceeds pre-allocated maximum 16",
        ),
        (step(ALL, hidden(batch=2, tokens=1)), "[1, tokens, 64], got float32 [2, 1, 64]"),
        (step(ALL, torch.zeros(1, 1, 32)), "64"),
        (step(ALL, hidden(tokens=1), hypo_ids=torch.tensor([1])), "hypo"),
        (step(ALL, hidden(tokens=1), hypo_ids=torch.tensor([-1])), "hypo"),
        (step(ALL, hidden(tokens=1), hypo_ids=torch.tensor([0, 0])), "hypo"),
        (step(ALL, hidden(tokens=1), hypo_ids=torch.tensor([0.0])), "hypo ids must be int64"),
        (step(ALL, hidden(tokens=1), start_from_position=5), "position"),
    ],
)
async def test_wrong_steps(world, second, text):
    assert text in await refused_session(world, step(ALL, hidden(), max_length=16), second)


async def test_first_tensor_without_three_dimensions(world):
    message = request(ALL, torch.zeros(4), DUMMY, NO_HYPOTHESES, max_length=16)
    assert "[batch, tokens, hidden size]" in await refused_session(world, message)


async def test_huge_batch_is_no_allocation(world):
    lie = step(ALL, hidden(), max_length=128)
    lie.tensors[0].size[0] = 2**31
    assert "Could not allocate" in await refused_session(world, lie)


async def test_session_id_reused(world):
    first = step(ALL, hidden(), max_length=16, session_id="the same")
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(first)
        await call.receive(timeout=10)
        assert await refused_session(world, first) == "session id the same is not unique"
        # another peer cannot take an id away from this one
        other = client_of(world, 77)
        async with other.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as theirs:
            await theirs.send(first)
            await theirs.receive(timeout=10)
            await theirs.end()
        await call.send(step(ALL, hidden(tokens=1)))
        await call.receive(timeout=10)
        await call.send(ExpertRequest())
        await call.end()
        assert [r async for r in call] == []


async def test_cache_is_bounded(world):
    """The third session finds no room and is told so at once; with a timeout it waits for the others."""
    target = world.holder(0)
    async with (
        world.client.stream(target, methods.RPC_INFERENCE, open_timeout=5) as one,
        world.client.stream(target, methods.RPC_INFERENCE, open_timeout=5) as two,
        world.client.stream(target, methods.RPC_INFERENCE, open_timeout=5) as three,
    ):
        for call in (one, two):
            await call.send(step(ALL, hidden(), max_length=128))
            await call.receive(timeout=10)
        text = await refused_session(world, step(ALL, hidden(), max_length=128))
        assert text.startswith("Could not allocate ")
        assert text.endswith(" bytes immediately: out of memory")
        await three.send(step(ALL, hidden(), max_length=128, alloc_timeout=30.0))
        await one.send(ExpertRequest())
        await one.end()
        assert (await three.receive(timeout=10)).tensors
        for call in (two, three):
            await call.send(ExpertRequest())
            await call.end()
            assert [r async for r in call] == []


@pytest.mark.parametrize("garbage", [b"\x00" * 64, b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", DEEP])
@pytest.mark.parametrize("method", methods.ALL, ids=lambda m: m.name.rpartition(".")[2])
async def test_garbage_on_every_protocol(world, method, garbage):
    stream = await world.network.hosts[world.client_peer].open_stream(world.holder(0), method.name)
    # some garbage reads as the beginning of a message, for which the server waits
    with trio.move_on_after(0.02), suppress(StreamReset):
        await stream.write(garbage)
        await stream.read(1000)
    await stream.close()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\x08\x01", "TransformerConnectionHandler.rpc_forward: ExpertRequest: uid has wire type 0"),
        (b"\x12\x02\x0a\x05", "ExpertRequest: tensors: buffer ends after 0 of 5 bytes"),
    ],
)
async def test_bytes_that_are_no_request(world, message, text):
    method = methods.RPC_FORWARD.name
    stream = await world.network.hosts[world.client_peer].open_stream(world.holder(0), method)
    await stream.write(envelope.encode_call(bytes(16), b"", method, message))
    answer = envelope.decode_answer(await read_delimited(stream, defaults.MAX_UNARY_BYTES))
    assert text in answer.error
    await stream.close()


async def test_streamed_request_over_the_limit(world):
    part = encode_tensor(torch.zeros(1, 4096, 64))
    async with world.client.stream(world.holder(0), methods.RPC_FORWARD_STREAM, open_timeout=5) as call:
        await call.send(ExpertRequest(uid=uid(ALL), tensors=[part]))
        with pytest.raises(HandlerError, match="bytes"):
            await call.receive(timeout=10)


async def test_error_texts_are_short(world):
    message = request(ALL, hidden(), DUMMY, active_adapter="x" * 3_000_000)
    assert len(await refused(world, methods.RPC_FORWARD, message)) <= defaults.MAX_ERROR_CHARACTERS


async def test_silent_streams_take_no_place(world):
    """More silent streams than there are places; an honest request is served at once."""
    async with AsyncExitStack() as stack:
        for number in range(defaults.MAX_TRAINING_REQUESTS + 4):
            stream = client_of(world, 100 + number).stream(
                world.holder(0), methods.RPC_FORWARD_STREAM, open_timeout=5
            )
            await stack.enter_async_context(stream)
        await world.client.call(
            world.holder(0), methods.RPC_FORWARD, request(ALL, hidden(), DUMMY), timeout=5
        )


async def test_one_peer_cannot_take_all_places(world):
    """It sends the first part of many requests and then nothing more."""
    slow = client_of(world, 50)
    async with AsyncExitStack() as stack:
        for _ in range(defaults.MAX_TRAINING_REQUESTS):
            stream = slow.stream(world.holder(0), methods.RPC_FORWARD_STREAM, open_timeout=5)
            call = await stack.enter_async_context(stream)
            await call.send(request(ALL, hidden()))
        await trio.testing.wait_all_tasks_blocked()
        await world.client.call(
            world.holder(0), methods.RPC_FORWARD, request(ALL, hidden(), DUMMY), timeout=5
        )


async def test_client_that_left_waits_for_no_cache(world):
    """It asked for more than there is, sent further requests ahead, and went."""
    target = world.holder(0)
    async with world.client.stream(target, methods.RPC_INFERENCE, open_timeout=5) as holder:
        for _ in range(2):
            await holder.send(step(ALL, hidden(tokens=1), max_length=128))
        await holder.receive(timeout=10)
        gone = await world.network.hosts[world.client_peer].open_stream(target, methods.RPC_INFERENCE.name)
        message = step(ALL, hidden(batch=2), max_length=128, alloc_timeout=600.0)
        await gone.write(frames.encode_message(*message.parts()) * 7)
        with trio.fail_after(5):
            while world.servers[target].open_sessions < 2:
                await trio.testing.wait_all_tasks_blocked()
        await gone.reset()
        with trio.fail_after(5):
            while world.servers[target].open_sessions > 1:
                await trio.testing.wait_all_tasks_blocked()
        await holder.receive(timeout=10)
        await holder.send(ExpertRequest())
        await holder.end()
        assert [r async for r in holder] == []


async def test_engine_trouble_is_told_and_logged(world, caplog):
    async def broken(*_args, **_more):
        raise EngineError("CUDA error: out of memory")

    engine = world.servers[world.holder(0)].span.engine
    engine.forward, real = broken, engine.forward
    try:
        text = await refused(world, methods.RPC_FORWARD, request(ALL, hidden(), DUMMY))
    finally:
        engine.forward = real
    assert text == "EngineError('CUDA error: out of memory')"
    assert caplog.records[-1].levelname == "ERROR"
