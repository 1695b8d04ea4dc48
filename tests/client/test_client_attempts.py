"""Trying again: who is tried at once, who after a pause, and when it ends."""

from __future__ import annotations

import math

import pytest
import trio
from client_fakes import peer, toy_swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError, NetworkError, NoRoute, PeerUnreachable, StreamClosed
from kwaainet_bridge.hivemind.client.attempts import Attempts
from kwaainet_bridge.hivemind.client.routing import Hop

BLOCKS = range(4)
GONE = PeerUnreachable("gone", hop="tcp")


def hop(number: int, network: str = "petals") -> Hop:
    return Hop(peer(number), BLOCKS, network)


async def test_other_servers_are_tried_at_once_and_the_same_one_after_a_pause(autojump_clock) -> None:
    async with toy_swarm() as toy:
        attempts = Attempts(toy.swarm, BLOCKS)
        start = trio.current_time()
        for number in range(1, 6):
            await attempts.failed(hop(number), GONE)
        await attempts.failed(hop(1, "kwaainet"), GONE)
        assert trio.current_time() == start
        await attempts.failed(hop(3), GONE)
        assert trio.current_time() - start == defaults.RETRY_MIN_SECONDS
        await attempts.failed(hop(4), GONE)
        assert trio.current_time() - start == defaults.RETRY_MIN_SECONDS


async def test_one_server_is_tried_for_a_minute(autojump_clock) -> None:
    async with toy_swarm() as toy:
        attempts = Attempts(toy.swarm, BLOCKS)
        start = trio.current_time()
        for _ in range(defaults.MAX_ATTEMPTS - 1):
            await attempts.failed(hop(1), GONE)
        assert trio.current_time() - start == 63
        with pytest.raises(NoRoute, match="gave up on blocks 0:4 after 8 attempts, the last: gone"):
            await attempts.failed(hop(1), GONE)


async def test_many_servers_that_fail_are_tried_for_no_longer(autojump_clock) -> None:
    async with toy_swarm() as toy:
        attempts = Attempts(toy.swarm, BLOCKS)
        start, tries = trio.current_time(), 0
        with pytest.raises(NoRoute):  # noqa: PT012
            while True:
                tries += 1
                await attempts.failed(hop(tries), GONE)
        assert trio.current_time() - start == 63
        assert tries == defaults.MAX_ATTEMPTS * (defaults.MAX_ATTEMPTS - 1) + 1


async def test_no_route_is_a_round_of_its_own(autojump_clock) -> None:
    async with toy_swarm() as toy:
        attempts = Attempts(toy.swarm, BLOCKS)
        start = trio.current_time()
        await attempts.failed(None, NetworkError("no route"))
        await attempts.failed(None, NetworkError("no route"))
        assert trio.current_time() - start == defaults.RETRY_MIN_SECONDS


@pytest.mark.parametrize(
    ("error", "is_last"),
    [(GONE, True), (StreamClosed("ended"), True), (HandlerError("step", "x", "no"), False)],
)
async def test_a_server_that_was_lost_comes_last_when_its_ban_is_over(
    error: Exception, is_last: bool, autojump_clock
) -> None:
    """As long as records may be old: those of a dead server live for minutes, longer than a ban."""
    async with toy_swarm() as toy:
        fast, slow = toy.add(0, 4, rps=1000.0), toy.add(0, 4, rps=10.0)
        assert await toy.swarm.session_chain(BLOCKS, 16) == [Hop(fast.peer, BLOCKS)]
        toy.swarm.note_failure(Hop(fast.peer, BLOCKS), error)
        await trio.sleep(defaults.BAN_SECONDS + 1)
        chosen = slow if is_last else fast
        assert await toy.swarm.session_chain(BLOCKS, 16) == [Hop(chosen.peer, BLOCKS)]
        assert toy.dht.reads == 1
        toy.swarm.note_success(Hop(fast.peer, BLOCKS))
        assert await toy.swarm.session_chain(BLOCKS, 16) == [Hop(fast.peer, BLOCKS)]


async def test_the_records_are_read_again_before_a_lost_server_is_tried(autojump_clock) -> None:
    async with toy_swarm() as toy:
        lost = toy.add(0, 4)
        await toy.swarm.session_chain(BLOCKS, 16)
        toy.swarm.note_failure(Hop(lost.peer, BLOCKS), GONE)
        await trio.sleep(defaults.BAN_SECONDS + 1)
        new = toy.add(0, 4, rps=1000.0)
        assert await toy.swarm.session_chain(BLOCKS, 16) == [Hop(new.peer, BLOCKS)]
        assert toy.dht.reads == 2
        assert all(map(math.isfinite, toy.swarm._rtts.values()))
