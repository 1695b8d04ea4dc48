"""Whom a host turned away and whom it could not reach, and what it tells of connected peers."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Refusals
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.dial_history import DialHistory
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.membership import Membership
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(3))
HERE, THERE = Address("ip4", "8.8.8.8", 1), Address("ip4", "8.8.4.4", 1)


def test_one_that_goes_on_is_one_of_the_latest_and_takes_nobody_s_place() -> None:
    refusals = Refusals()
    refusals.note("streams", "early", "too many", 1.0)
    for moment in range(10_000):
        refusals.note("address", "192.0.2.1", "too many", float(moment))
    refusals.note("streams", "192.0.2.1", "another scope", 10_001.0)
    assert refusals.counts["address"] == 10_000
    assert refusals.counts["streams"] == 2
    assert [(one.who, one.scope, one.times, one.at) for one in refusals.latest] == [
        ("192.0.2.1", "streams", 1, 10_001.0),
        ("192.0.2.1", "address", 10_000, 9_999.0),
        ("early", "streams", 1, 1.0),
    ]


def test_few_are_kept_however_many_come() -> None:
    refusals = Refusals()
    for number in range(1000):
        refusals.note("connections", f"peer {number}", "full", 0.0)
    assert len(refusals.latest) == defaults.REFUSED_KEPT
    assert refusals.latest[0].who == "peer 999"
    assert refusals.counts["connections"] == 1000


async def test_a_host_tells_whose_streams_it_refused_and_why() -> None:
    limits = Limits(streams_per_peer=3)
    async with (
        open_host(HostConfig(Identity.generate("ed25519"), limits=limits)) as server,
        open_host(HostConfig(Identity.generate("ed25519"), listen=())) as caller,
    ):
        server.serve("Echo.run", echo)
        await caller.connect(server.addresses()[0])
        with trio.fail_after(20):
            await caller.wait_identified()
            await server.wait_identified()
            for _ in range(5):
                with contextlib.suppress(NetworkError):
                    stream = await caller.open_stream(server.peer_id, "Echo.run")
                    await stream.write(b"x")
                    await stream.read(1)
        (told,) = server.refused.latest
        assert (told.who, told.scope) == (str(caller.peer_id), "streams")
        assert told.reason == "too many streams at one time"
        (connection,) = server.connections
        assert connection.address is not None
        assert connection.address.transport.startswith("/ip4/127.0.0.1/tcp/")


async def test_a_peer_that_cannot_be_dialled_is_told_with_the_reason() -> None:
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        with pytest.raises(NetworkError):
            await host.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{A}")
        ((peer, result),) = host.unreachable()
        assert (peer, result.hop, result.failures) == (A, "tcp", 1)
        assert "efused" in result.error


def test_who_was_reached_at_any_address_is_not_unreachable() -> None:
    now = [100.0]
    history = DialHistory(clock=lambda: now[0], rng=random.Random(1))
    history.failed(A, HERE, "tcp", "refused")
    history.failed(B, HERE, "tcp", "refused")
    history.succeeded(B, THERE)
    now[0] = 200.0
    history.failed(C, HERE, "noise", "another peer")
    history.failed(C, THERE, "tcp", "no answer")
    assert [(peer, r.address, r.error) for peer, r in history.unreachable()] == [
        (C, THERE, "no answer"),
        (A, HERE, "refused"),
    ]
    history.succeeded(A, HERE)
    assert [peer for peer, _ in history.unreachable()] == [C]


def test_a_peer_may_be_in_several_networks() -> None:
    membership = Membership({"kwaainet": ["/kwaai/"], "petals": ["DHTProtocol.", "Transformer"]})
    membership.speaks(A, ["/kwaai/hello/1.0.0", "DHTProtocol.rpc_ping"])
    membership.speaks(B, ["Transformer.rpc_info"])
    membership.speaks(C, ["/ipfs/ping/1.0.0"])
    assert [membership.all_of(peer) for peer in (A, B, C)] == [["kwaainet", "petals"], ["petals"], []]
    assert membership.of(A) == "kwaainet"
