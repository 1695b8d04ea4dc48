"""Pushes: a step's output goes straight to the next server, and the client's own copy is then dropped."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing
from expert_calls import DUMMY, hidden, output, request, step
from expert_world import client_of, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.push import PushLimit
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.peer_id import PeerId

FIRST, SECOND = range(4), range(4, 8)


@pytest.fixture
async def world():
    async with tiny_world(FIRST, SECOND, cache_tokens=512, max_length=128) as world:
        yield world


class Chain:
    """A client's session over both servers, with pushes from the first to the second."""

    def __init__(self, world, first, second):
        self.world, self.first, self.second = world, first, second
        self.number = 0

    def metadata(self, session_id, **more):
        more.setdefault("step_id", f"step {self.number}")
        if self.number == 0:
            more["max_length"] = 64
        return {"session_id": session_id, **more}

    async def by_hand(self, inputs, **arguments):
        """One step sent to both servers by the client."""
        await self.first.send(step(FIRST, inputs, **arguments, **self.metadata("one")))
        between = output(await self.first.receive(timeout=10))
        await self.second.send(step(SECOND, between, **arguments, **self.metadata("two")))
        result = output(await self.second.receive(timeout=10))
        self.number += 1
        return result

    async def pushed(self, inputs, **arguments):
        """One step sent to the first server only; the second gets it from there."""
        route = [(str(self.world.holder(4)), "two", 4, 8)]
        await self.first.send(step(FIRST, inputs, **arguments, **self.metadata("one", next_servers=route)))
        self.between = output(await self.first.receive(timeout=10))
        result = output(await self.second.receive(timeout=10))
        self.number += 1
        return result


def open_chain(world):
    first = world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5)
    second = world.client.stream(world.holder(4), methods.RPC_INFERENCE, open_timeout=5)
    return first, second


async def test_pushed_steps_equal_sent_ones(world):
    inputs = [hidden(2, 5), hidden(2, 1, seed=1), hidden(2, 1, seed=2), hidden(2, 1, seed=3)]
    swap = torch.tensor([1, 1])
    one, two = open_chain(world)
    async with one as first, two as second:
        chain = Chain(world, first, second)
        by_hand = [await chain.by_hand(x) for x in inputs[:3]]
        by_hand.append(await chain.by_hand(inputs[3], hypo_ids=swap))
    one, two = open_chain(world)
    async with one as first, two as second:
        chain = Chain(world, first, second)
        pushed = [await chain.by_hand(inputs[0])]
        pushed += [await chain.pushed(x) for x in inputs[1:3]]
        # the reordering of this step, not of the session's first one, goes along
        pushed.append(await chain.pushed(inputs[3], hypo_ids=swap))
    torch.testing.assert_close(pushed, by_hand)


async def test_second_copy_is_dropped(world):
    one, two = open_chain(world)
    async with one as first, two as second:
        chain = Chain(world, first, second)
        await chain.by_hand(hidden())
        await chain.pushed(hidden(1, 1, seed=1))
        # the client's own copy of the step that was pushed: no answer, no second token in the cache
        await second.send(step(SECOND, chain.between, session_id="two", step_id="step 1"))
        last = await chain.by_hand(hidden(1, 1, seed=2))
    one, two = open_chain(world)
    async with one as first, two as second:
        chain = Chain(world, first, second)
        for inputs in (hidden(), hidden(1, 1, seed=1)):
            await chain.by_hand(inputs)
        torch.testing.assert_close(last, await chain.by_hand(hidden(1, 1, seed=2)))


async def test_steps_with_prompts_are_not_pushed(world):
    one, two = open_chain(world)
    async with one as first, two as second:
        chain = Chain(world, first, second)
        await chain.by_hand(hidden())
        route = [(str(world.holder(4)), "two", 4, 8)]
        prompts = torch.zeros(4, 1, 1, 64)
        await first.send(
            step(FIRST, hidden(1, 1), prompts=prompts, **chain.metadata("one", next_servers=route))
        )
        await first.receive(timeout=10)
        with trio.move_on_after(0.2) as silence:
            await second.receive()
        assert silence.cancelled_caught


async def test_push_to_a_dead_server_costs_the_session_nothing(world):
    world.network.take_down(world.holder(4))
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        for number in range(3):
            route = [(str(world.holder(4)), "two", 4, 8)]
            await call.send(step(FIRST, hidden(1, 1, number), next_servers=route, max_length=16))
            assert output(await call.receive(timeout=5)).shape == (1, 1, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": range(4, 7)},
        {"inputs": hidden(2, 1)},
        {"inputs": torch.zeros(1, 1, 32)},
        {"inputs": torch.zeros(1, 64)},
        {"session_id": "another"},
    ],
    ids=["blocks", "batch", "hidden size", "dimensions", "session"],
)
async def test_pushes_that_do_not_fit_are_ignored(world, wrong):
    intruder = client_of(world, 99)
    async with world.client.stream(world.holder(4), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(SECOND, hidden(), session_id="two", max_length=16))
        await call.receive(timeout=10)
        message = request(
            wrong.get("blocks", SECOND),
            wrong.get("inputs", hidden(1, 1)),
            DUMMY,
            session_id=wrong.get("session_id", "two"),
            step_id="x",
            pushed=True,
        )
        await intruder.call(world.holder(4), methods.RPC_PUSH, message, timeout=5)
        with trio.move_on_after(0.1) as silence:
            await call.receive()
        assert silence.cancelled_caught
        await call.send(step(SECOND, hidden(1, 1)))
        assert (await call.receive(timeout=10)).tensors


async def test_pushed_step_that_fails_leaves_the_session_alone(world):
    """Its numbers may be wrong in ways that only the engine sees; the client's copy decides."""
    async with world.client.stream(world.holder(4), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(SECOND, hidden(), session_id="two", max_length=8))
        await call.receive(timeout=10)
        too_long = request(SECOND, hidden(1, 5), DUMMY, session_id="two", step_id="x", pushed=True)
        await world.client.call(world.holder(4), methods.RPC_PUSH, too_long, timeout=5)
        await call.send(step(SECOND, hidden(1, 4), session_id="two", step_id="x"))
        assert output(await call.receive(timeout=10)).shape == (1, 4, 64)


async def test_push_of_a_stranger_cannot_end_a_session(world):
    """Neither by claiming to be the client's own step nor by having no step id."""
    async with world.client.stream(world.holder(4), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(SECOND, hidden(), session_id="two", max_length=8))
        await call.receive(timeout=10)
        for more in ({"step_id": "x", "pushed": False}, {"step_id": "y"}, {}):
            evil = request(SECOND, hidden(1, 1), DUMMY, session_id="two", active_adapter="evil", **more)
            await client_of(world, 99).call(world.holder(4), methods.RPC_PUSH, evil, timeout=5)
        await call.send(step(SECOND, hidden(1, 4), session_id="two", step_id="x"))
        assert output(await call.receive(timeout=10)).shape == (1, 4, 64)


@pytest.mark.parametrize("route", [[("x",)], [("x", "y", 0, 10**9)], "x", [("x", "y", 0, 4)]])
async def test_malformed_route_costs_no_answer(world, route):
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(FIRST, hidden(), max_length=16, next_servers=route))
        assert output(await call.receive(timeout=10)).shape == (1, 4, 64)


async def test_push_needs_a_session_id(world):
    with pytest.raises(HandlerError) as caught:
        await world.client.call(world.holder(4), methods.RPC_PUSH, request(SECOND, hidden()), timeout=5)
    assert caught.value.text == "KeyError('session_id')"


async def test_flood_of_unknown_pushes_is_refused(world):
    message = request(SECOND, session_id="nobody's", step_id="x")
    for _ in range(defaults.UNKNOWN_PUSHES_PER_MINUTE):
        await world.client.call(world.holder(4), methods.RPC_PUSH, message, timeout=5)
    with pytest.raises(HandlerError, match="too many pushes"):
        await world.client.call(world.holder(4), methods.RPC_PUSH, message, timeout=5)
    # others are not affected
    await client_of(world, 98).call(world.holder(4), methods.RPC_PUSH, message, timeout=5)


def test_push_limit_forgets():
    now = 0.0
    limit = PushLimit(lambda: now)
    peers = [PeerId(bytes([0x12, 0x20, n]) + bytes(31)) for n in range(3)]
    for _ in range(2):
        for _ in range(defaults.UNKNOWN_PUSHES_PER_MINUTE):
            limit.count_unknown(peers[0])
        now += 61
    limit.count_unknown(peers[1])
    assert len(limit._recent) == 1


async def test_end_without_a_farewell(world):
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(FIRST, hidden(), max_length=16))
        await call.receive(timeout=10)
        await call.end()
        assert [r async for r in call] == []


async def test_client_that_vanishes_frees_its_cache(world):
    engine = world.servers[world.holder(0)].span.engine
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(FIRST, hidden(), max_length=128))
        await call.receive(timeout=10)
        assert engine.cache_bytes_left < engine.cache_bytes_total
        await call._stream.reset()
    server = world.servers[world.holder(0)]
    with trio.fail_after(5):
        await server.drain()
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_draining_server_takes_no_new_sessions(world):
    server = world.servers[world.holder(0)]
    async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as running:
        await running.send(step(FIRST, hidden(), max_length=16))
        await running.receive(timeout=10)
        assert await server.drain(timeout=0.05) == 1
        async with world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as late:
            await late.send(step(FIRST, hidden(), max_length=16))
            with pytest.raises(HandlerError, match="shutting down"):
                await late.receive(timeout=10)
        await running.send(step(FIRST, hidden(1, 1)))
        await running.receive(timeout=10)
        await running.send(ExpertRequest())
        await running.end()
        assert [r async for r in running] == []
    with trio.fail_after(5):
        assert await server.drain() == 0


async def test_silent_session_ends_after_the_step_timeout(mock_clock):
    async with (
        tiny_world(FIRST, cache_tokens=256) as world,
        world.client.stream(world.holder(0), methods.RPC_INFERENCE, open_timeout=5) as call,
    ):
        await call.send(step(FIRST, hidden(), max_length=16))
        await call.receive()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(defaults.STEP_TIMEOUT_SECONDS - 1)
        await trio.testing.wait_all_tasks_blocked()
        assert world.servers[world.holder(0)].open_sessions == 1
        mock_clock.jump(1)
        await trio.testing.wait_all_tasks_blocked()
        assert world.servers[world.holder(0)].open_sessions == 0
        mock_clock.jump(defaults.CLOSE_GRACE_SECONDS)
        with pytest.raises(trio.EndOfChannel):
            await call.receive()
