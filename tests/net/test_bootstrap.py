"""The keeper, over a host that only pretends; all time is the test clock's."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from kwaainet_bridge.errors import ConfigError, PeerUnreachable
from kwaainet_bridge.net.bootstrap import BootstrapEvent, keep_bootstrapped
from kwaainet_bridge.wire.peer_id import PeerId

OWN, ONE, TWO = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(3))


def address(peer: PeerId) -> str:
    return f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}"


class PretendHost:
    peer_id = OWN

    def __init__(self) -> None:
        self.attempts: list[tuple[float, str]] = []
        self.unreachable: set[str] = set()
        self.dropped = trio.Event()
        self.protected: Counter[PeerId] = Counter()

    async def connect(self, text: str) -> PeerId:
        self.attempts.append((trio.current_time(), text))
        await trio.sleep(0.01)
        if text in self.unreachable:
            raise PeerUnreachable("refused", hop="tcp")
        return PeerId.parse(text.rpartition("/")[2])

    async def wait_disconnected(self, peer: PeerId) -> None:  # noqa: ARG002 - of the interface
        await self.dropped.wait()

    def protect(self, peer: PeerId, tag: str) -> None:
        assert tag == "bootstrap"
        self.protected[peer] += 1

    def unprotect(self, peer: PeerId, tag: str) -> None:
        assert tag == "bootstrap"
        self.protected[peer] -= 1


async def run_for(seconds: float, host: PretendHost, *addresses: str) -> list[BootstrapEvent]:
    events: list[BootstrapEvent] = []
    with trio.move_on_after(seconds):
        await keep_bootstrapped(host, addresses, on_event=events.append, rng=random.Random(1))
    return events


async def test_one_that_is_down_does_not_keep_the_other_waiting(autojump_clock) -> None:
    host = PretendHost()
    host.unreachable.add(address(ONE))
    events = await run_for(0.1, host, address(ONE), address(TWO))
    by_peer = {event.peer: event for event in events}
    assert by_peer[TWO].connected
    assert not by_peer[ONE].connected
    assert by_peer[ONE].error.hop == "tcp"


async def test_waits_are_random_below_a_doubling_bound(autojump_clock) -> None:
    host = PretendHost()
    host.unreachable.add(address(ONE))
    events = await run_for(3600, host, address(ONE))
    waits = [event.retry_in for event in events]
    assert all(wait <= min(300, 2 * 2**i) for i, wait in enumerate(waits))
    assert max(waits) > 100
    assert min(waits[8:]) < 100  # full jitter, not a fixed step
    assert len(waits) > 3600 / 300


async def test_reconnects_after_a_drop(autojump_clock) -> None:
    host = PretendHost()

    async def drop() -> None:
        await trio.sleep(100)
        host.dropped.set()
        host.dropped = trio.Event()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drop)
        events = await run_for(200, host, address(ONE))
    assert [event.connected for event in events] == [True, True]
    assert 100 < host.attempts[1][0] - host.attempts[0][0] < 103


async def test_a_peer_that_drops_at_once_is_tried_ever_less_often(autojump_clock) -> None:
    host = PretendHost()
    host.dropped.set()
    await run_for(3600, host, address(ONE))
    assert len(host.attempts) < 60


async def test_peers_are_protected_while_they_are_kept(autojump_clock) -> None:
    host = PretendHost()
    during = Counter()

    def look(_: BootstrapEvent) -> None:
        during.update(host.protected)

    with trio.move_on_after(0.1):
        await keep_bootstrapped(host, [address(ONE)], on_event=look)
    assert during == {ONE: 1}
    assert not +host.protected


async def test_own_address_is_left_out(autojump_clock) -> None:
    assert await run_for(10, PretendHost(), address(OWN)) == []


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/tcp/1", "bootstrap.example", f"/dnsaddr/a.b/p2p/{ONE}"])
async def test_malformed_address(text: str) -> None:
    with pytest.raises(ConfigError, match=f"bootstrap address '{text}'"):
        await keep_bootstrapped(PretendHost(), [text], on_event=print)
