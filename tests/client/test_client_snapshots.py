"""What a client tells of its sessions, and of servers that it avoids."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from client_fakes import peer, random_hidden, toy_swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CapacityDenied, NoRoute, Refusal
from kwaainet_bridge.hivemind.client import open_session
from kwaainet_bridge.hivemind.client.routing import Bans, Hop


async def test_sessions_are_told_while_they_are_open(autojump_clock: trio.testing.MockClock) -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 2), toy.add(2, 6)
        seen = []

        def look(*_: object) -> None:
            seen.append(toy.swarm.sessions()[0])

        toy.servers[0].before_answer = look
        hidden = random_hidden(2, 9, 4)
        assert toy.swarm.sessions() == []
        async with open_session(toy.swarm, batch_size=2, max_length=16) as session:
            (new,) = toy.swarm.sessions()
            assert (new.blocks, new.batch_size, new.max_length) == (range(6), 2, 16)
            assert (new.position, new.chain, new.adapter) == (0, [], None)
            await session.step(hidden[:, :5])
            await session.step(hidden[:, 5:6])
            assert [(one.position, one.idle_since) for one in seen] == [(0, None), (5, None)]
            await trio.sleep(30)
            (idle,) = toy.swarm.sessions()
            assert idle.position == 6
            assert [hop.blocks for hop in idle.chain] == [range(2), range(2, 6)]
            assert idle.began <= idle.idle_since
            assert toy.swarm.now - idle.idle_since == pytest.approx(30, abs=0.1)
            async with open_session(toy.swarm, max_length=4):
                assert [one.max_length for one in toy.swarm.sessions()] == [16, 4]
        assert toy.swarm.sessions() == []


async def test_a_session_that_fails_is_told_no_longer(autojump_clock: trio.testing.MockClock) -> None:
    async with toy_swarm(2) as toy:
        toy.add(0, 2)

        def fail(*_: object) -> None:
            raise Refusal("out of order")

        toy.servers[0].before_answer = fail
        with pytest.raises(NoRoute):
            async with open_session(toy.swarm, max_length=4) as session:
                await session.step(random_hidden(1, 1, 4))
        assert toy.swarm.sessions() == []
        (avoided,) = toy.swarm.avoided()
        assert "out of order" in avoided.reason
        assert 0 < avoided.seconds <= defaults.MAX_BAN_SECONDS
        assert avoided.network == "petals"


async def test_servers_that_are_full_are_avoided_for_as_long_as_they_say() -> None:
    async with toy_swarm(2) as toy:
        hop = Hop(peer(9), range(2), "kwaainet")
        toy.swarm.note_failure(hop, CapacityDenied("it is full", reason="at_capacity", retry_after=7))
        (avoided,) = toy.swarm.avoided()
        assert (avoided.peer, avoided.network, avoided.reason) == (peer(9), "kwaainet", "it is full")
        assert 6 < avoided.seconds <= 7
        toy.swarm.note_success(hop)
        assert toy.swarm.avoided() == []


def test_bans_tell_until_when_and_why() -> None:
    bans = Bans(first=10, longest=100)
    one, two = (peer(1), "petals"), (peer(2), "petals")
    bans.add(one, 0.0, "x" * 5000)
    bans.add(one, 5.0, "later, and the same failure")
    bans.pause(two, 7.0, "full")
    assert bans.lasting(6.0) == [(one, 10.0, "x" * defaults.MAX_ERROR_CHARACTERS), (two, 7.0, "full")]
    assert bans.lasting(8.0) == [(one, 10.0, "x" * defaults.MAX_ERROR_CHARACTERS)]
    bans.lift(one)
    assert bans.lasting(0.0) == [(two, 7.0, "full")]
