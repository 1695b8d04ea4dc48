"""The machine of leases, and what callers are told."""

from __future__ import annotations

import itertools
import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from kwaai_world import bare_server, peer, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CapacityDenied, LeaseDenied
from kwaainet_bridge.kwaai.lease import Leases
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.wire.kwaai_lease import Denial, Denied, Granted

A, B, C = peer(1), peer(2), peer(3)
STREAM = object()


def leases(**settings):
    return Leases(itertools.count(1).__next__, **settings)


def test_a_peer_gets_the_same_lease_again_and_longer():
    desk = leases()
    assert desk.grant(A, 0, room=5, uses={}) == Granted(1, 30)
    assert desk.grant(A, 20, room=5, uses={}) == Granted(1, 30)
    assert desk.keep(A, 1, 49)
    assert desk.grant(B, 49, room=5, uses={}) == Granted(2, 30)
    assert not desk.keep(B, 1, 49)
    assert desk.grant(A, 80, room=5, uses={}) == Granted(3, 30)  # the first has ended


def test_requests_renew_the_lease_of_no_stream():
    desk = leases()
    desk.grant(A, 0, room=9, uses={})
    desk.grant(A, 0, room=9, uses={}, origin=STREAM)
    desk.renew(A, 29)
    desk.renew(B, 29)
    assert desk.keep(A, 1, 31)
    assert not desk.keep(A, 2, 31)


def test_no_peer_leases_more_than_is_left_for_others():
    desk = leases()
    got = [desk.grant(A, 0, room=8, uses={}, origin=STREAM) for _ in range(6)]
    assert [type(outcome) for outcome in got] == [Granted] * 4 + [Denied] * 2
    assert got[-1] == Denied(Denial.AT_CAPACITY, 5)
    assert isinstance(desk.grant(B, 0, room=8, uses={}, origin=STREAM), Granted)
    assert isinstance(desk.grant(B, 0, room=8, uses={}, origin=STREAM), Granted)
    assert isinstance(desk.grant(B, 0, room=8, uses={}, origin=STREAM), Denied)
    assert isinstance(desk.grant(C, 0, room=8, uses={}), Granted)


def test_no_peer_has_more_than_its_number():
    desk = leases(per_peer=3)
    got = [desk.grant(A, 0, room=100, uses={A: 50}, origin=STREAM) for _ in range(4)]
    assert [type(outcome) for outcome in got] == [Granted] * 3 + [Denied]


def test_used_leases_hold_nothing_free():
    desk = leases()
    desk.grant(A, 0, room=1, uses={})
    assert not desk.may_begin(B, 0, room=1, uses={})
    assert desk.may_begin(A, 0, room=1, uses={})
    assert desk.may_begin(A, 0, room=1, uses={A: 1})
    assert not desk.may_begin(A, 0, room=0, uses={A: 1})
    assert desk.may_begin(B, 0, room=1, uses={A: 1})


def test_when_to_ask_again():
    desk = leases()
    assert desk.retry_after(0) == 5
    desk.grant(A, 0, room=1, uses={})
    for now, seconds in ((0, 5), (26, 4), (28.5, 2), (29.9, 1)):
        assert desk.grant(B, now, room=1, uses={}) == Denied(Denial.AT_CAPACITY, seconds)
    assert isinstance(desk.grant(B, 30, room=1, uses={}), Granted)


def test_released_and_ended():
    desk = leases()
    desk.grant(A, 0, room=9, uses={}, origin=STREAM)
    desk.grant(A, 0, room=9, uses={}, origin=STREAM)
    desk.grant(A, 0, room=9, uses={})
    desk.release(B, 1)
    desk.release(A, 77)
    assert len(desk) == 3
    desk.release(A, 1)
    assert len(desk) == 2
    desk.end(A, object())
    desk.end(A, STREAM)
    assert len(desk) == 1
    assert desk.keep(A, 3, 1)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 40), st.booleans()), max_size=60))
def test_never_more_unused_leases_than_places(events):
    desk = leases(per_peer=4)
    now, room, ends = 0, 6, {}
    for who, seconds, on_stream in events:
        now += seconds
        ends = {key: end for key, end in ends.items() if end > now}
        outcome = desk.grant(who, now, room=room, uses={}, origin=STREAM if on_stream else None)
        if isinstance(outcome, Granted):
            ends[who, outcome.lease_id] = now + 30
        assert len(ends) <= room
        assert all(sum(p == who for p, _ in ends) <= 4 for who in (A, B, C))


# --- over the network


async def test_a_lease_and_a_denial():
    async with tiny_world(range(4), max_length=64, cache_tokens=64) as world:
        server = world.nodes[0].peer
        one, two = world.client(100), world.client(101)
        lease = await one.lease(server, "tiny-llama-hf")
        assert lease.ttl_secs == 30
        assert await one.lease(server) == lease
        with pytest.raises(CapacityDenied, match="is at capacity, ask again in 5 s") as e:
            await two.lease(server)
        assert (e.value.retry_after, e.value.reason) == (5, "DeniedAtCapacity")
        with pytest.raises(LeaseDenied, match="DeniedWrongModel") as e:
            await two.lease(server, "another")
        assert not isinstance(e.value, CapacityDenied)
        await one.step_ids(server, 1, 0, [1, 2])  # its lease is its place


async def test_each_request_renews_and_time_ends_leases():
    now = 0.0
    async with tiny_world(range(4), max_length=64, cache_tokens=640) as world:
        server = world.nodes[0].server
        server._places._clock = lambda: now
        client = world.client()
        lease = await client.lease(world.nodes[0].peer)
        now = 25
        await client.step_ids(world.nodes[0].peer, 1, 0, [1])
        now = 50
        assert await client.lease(world.nodes[0].peer) == lease
        now = 90
        assert await client.lease(world.nodes[0].peer) != lease


async def test_before_and_after_it_serves_there_is_no_place():
    async with bare_server(KwaaiProtocols(), rng=random.Random(1)) as (world, server, address):
        with pytest.raises(CapacityDenied):
            await world.client().lease(address, "whatever it will be")
        await server.drain()
        with pytest.raises(CapacityDenied) as e:
            await world.client().lease(address)
        assert e.value.retry_after == defaults.KWAAI_LEASE_SECONDS


async def test_leases_end_by_trio_s_own_clock(autojump_clock):
    from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint

    endpoint = MuxEndpoint(url="http://127.0.0.1:1", paths=["/x"], requests=1)
    async with bare_server(KwaaiProtocols(mux=endpoint)) as (world, _, address):
        await world.client(100).lease(address)
        with pytest.raises(CapacityDenied):
            await world.client(101).lease(address)
        await trio.sleep(31)
        await world.client(101).lease(address)
