"""What a server keeps of messages that it is done with: nothing."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
import trio.testing
from expert_calls import hidden, step
from expert_world import tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.experts import methods
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
