"""What a server keeps of messages that it is done with: nothing."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
import trio
import trio.testing
from expert_calls import hidden, step
from expert_world import peer, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.push import Pusher
from kwaainet_bridge.hivemind.experts.requests import Metadata
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import encode_tensor

FILLER = 4 * defaults.MIB


def heavy_step(blocks, **metadata):
    """A step of four tokens, with a tensor and an entry of the metadata that nobody asked for."""
    message = step(blocks, hidden(), session_id="held", filler=bytes(FILLER // 2), **metadata)
    message.tensors.append(encode_tensor(torch.zeros(FILLER, dtype=torch.uint8)))
    return message


@pytest.fixture
def traced():
    """How many bytes of Python's memory were taken since the first question and are not free again."""

    def held() -> int:
        gc.collect()
        if not tracemalloc.is_tracing():
            tracemalloc.start()  # loading a model under it takes seconds
        return tracemalloc.get_traced_memory()[0]

    yield held
    tracemalloc.stop()


async def test_a_session_keeps_none_of_its_messages(traced):
    async with tiny_world() as world:
        blocks = range(4)
        opened = world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5)
        async with opened as call:
            traced()
            await call.send(heavy_step(blocks, max_length=16))
            await call.receive(timeout=10)
            await trio.testing.wait_all_tasks_blocked()
            assert traced() < FILLER / 4
            await call.send(heavy_step(blocks))
            await call.receive(timeout=10)
            await trio.testing.wait_all_tasks_blocked()
            assert traced() < FILLER / 4


def held_by(request):
    """The bytes in which the tensors of a request lie, whatever part of them they are."""
    return sum(len(whole) for whole in {memoryview(t.buffer).obj for t in request.tensors})


async def test_a_push_under_way_keeps_only_what_it_sends():
    pushed = []

    class Client:
        async def call(self, _peer, _method, request, **_timeout):
            pushed.append(request)

    message = step(range(4), hidden(), next_servers=[(str(peer(1)), "next", 4, 8)])
    unknown = b"\x3a\x80\x80\x80\x02" + bytes(FILLER)
    received = ExpertRequest.read(b"".join([*message.parts(), unknown]))
    assert held_by(received) > FILLER
    async with trio.open_nursery() as nursery:
        pusher = Pusher(Client(), nursery)
        pusher.push("tiny-llama-hf", received, Metadata(received.metadata), encode_tensor(hidden()))
    assert pushed[0].tensors[0].size == [1, 4, 64]
    assert held_by(pushed[0]) == pushed[0].length()


async def test_a_pushed_step_waits_in_memory_of_its_own_size():
    """The peer that pushed is done with its call, so what waits for the session is all that counts."""
    offered = []
    async with tiny_world(range(4, 8)) as world:
        service = world.servers[world.holder(4)].inference
        opened = world.client.stream(world.holder(4), methods.RPC_INFERENCE, open_timeout=5)
        async with opened as call:
            await call.send(step(range(4, 8), hidden(), session_id="held", max_length=16))
            await call.receive(timeout=10)
            (live,) = service._by_id["held"]
            live.call.offer = lambda request: offered.append(request) or True
            message = step(range(4, 8), hidden(), session_id="held")
            received = ExpertRequest.read(b"".join([*message.parts(), b"\x3a\x80\x80\x04", bytes(1 << 16)]))
            await service.push(received, live.call.context)
    assert held_by(offered[0]) == offered[0].length()
