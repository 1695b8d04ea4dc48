"""Calls of several tasks at once leave torch's gradients as they were, which are a setting of the whole thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import trio
from client_fakes import ToySwarm, random_hidden, toy_swarm

from kwaainet_bridge.hivemind.client import backward, forward, open_session


@pytest.fixture(autouse=True)
def _gradients_on() -> Iterator[None]:
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)


async def steps(toy: ToySwarm, first: trio.Event, second: trio.Event) -> None:
    async with open_session(toy.swarm, max_length=8) as session:
        for number in range(4):
            output = await session.step(random_hidden(1, 1, 4).requires_grad_())
            assert not output.requires_grad
            if number == 1:
                first.set()
                await second.wait()


async def passes(toy: ToySwarm, first: trio.Event, second: trio.Event) -> None:
    hidden, prompts = random_hidden(1, 3, 4).requires_grad_(), random_hidden(4, 1, 2, 4).requires_grad_()
    for number in range(4):
        done = await forward(toy.swarm, hidden, prompts=prompts)
        assert not done.output.requires_grad
        gradients = await backward(toy.swarm, done, torch.ones_like(hidden), prompts=prompts)
        assert not gradients.hidden.requires_grad
        assert gradients.prompts is not None
        assert not gradients.prompts.requires_grad
        if number == 1:
            first.set()
            await second.wait()


@pytest.mark.parametrize("call", [steps, passes])
@pytest.mark.parametrize("enabled", [True, False])
async def test_tasks_that_take_turns_leave_gradients_on(call, enabled: bool) -> None:
    """While one task's call is under way others begin theirs, end them, and compute gradients of their own."""
    async with toy_swarm() as toy:
        toy.add(0, 2), toy.add(2, 4)
        one, two = trio.Event(), trio.Event()
        torch.set_grad_enabled(enabled)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, toy, one, two)
            nursery.start_soon(call, toy, two, one)
            for _ in range(5):
                await trio.lowlevel.checkpoint()
                assert torch.is_grad_enabled() is enabled
        assert torch.is_grad_enabled() is enabled
