"""Peers that are connected hear of changes: who, when, and how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host, own_addresses
from kwaainet_bridge.net.addresses import parse_listen_address
from kwaainet_bridge.net.identify import IDENTIFY, IDENTIFY_PUSH
from kwaainet_bridge.net.identify_push import IdentifyPush
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.wire.peer_id import PeerId

ONE, TWO = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(2))


class Swarm:
    """Peers that take pushes, and the pushes they got."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.listeners: list[PeerId] = []
        self.got: list[tuple[float, PeerId]] = []
        self.takes: dict[PeerId, float] = {}
        self.start = trio.current_time()
        self.push = IdentifyPush(lambda: self.listeners, self.send)
        nursery.start_soon(self.push.run)

    async def send(self, peer: PeerId) -> None:
        self.got.append((round(trio.current_time() - self.start, 3), peer))
        await trio.sleep(self.takes.get(peer, 0))

    def join(self, peer: PeerId) -> None:
        """Connect, ask, and describe itself."""
        self.push.told(peer)
        self.listeners.append(peer)
        self.push.described(peer)


@pytest.fixture
async def swarm(nursery: trio.Nursery) -> Swarm:
    return Swarm(nursery)


DELAY = defaults.IDENTIFY_PUSH_SECONDS


async def test_changes_are_told_once_for_all(autojump_clock, swarm: Swarm) -> None:
    swarm.join(ONE)
    for _ in range(5):
        swarm.push.changed()
    await trio.sleep(100)
    assert swarm.got == [(DELAY, ONE)]
    swarm.push.changed()
    await trio.sleep(100)
    assert len(swarm.got) == 2


async def test_without_a_change_nobody_is_told(autojump_clock, swarm: Swarm) -> None:
    swarm.join(ONE)
    await trio.sleep(100)
    assert swarm.got == []


async def test_who_leaves_while_waiting_for_a_push_is_forgotten(autojump_clock, swarm: Swarm) -> None:
    peers = [PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(defaults.IDENTIFY_PUSHES_AT_ONCE + 10)]
    for peer in peers:
        swarm.join(peer)
        swarm.takes[peer] = 10
    swarm.push.changed()
    await trio.sleep(DELAY + 1)
    for peer in peers:
        swarm.push.forget(peer)
    swarm.listeners.clear()
    await trio.sleep(100)
    assert len(swarm.got) == defaults.IDENTIFY_PUSHES_AT_ONCE
    assert not swarm.push._told


async def test_who_asked_after_the_change_is_not_told(autojump_clock, swarm: Swarm) -> None:
    swarm.join(ONE)
    swarm.push.changed()
    swarm.join(TWO)
    await trio.sleep(100)
    assert swarm.got == [(DELAY, ONE)]


async def test_who_describes_itself_after_the_change_is_told(autojump_clock, swarm: Swarm) -> None:
    swarm.push.told(ONE)
    swarm.push.changed()
    await trio.sleep(10)
    assert swarm.got == []
    swarm.listeners.append(ONE)
    swarm.push.described(ONE)
    await trio.sleep(10)
    assert swarm.got == [(10 + DELAY, ONE)]


async def test_who_left_is_forgotten(autojump_clock, swarm: Swarm) -> None:
    swarm.join(ONE)
    swarm.listeners.remove(ONE)
    swarm.push.forget(ONE)
    swarm.push.changed()
    await trio.sleep(10)
    assert swarm.got == []
    assert not swarm.push._told


async def test_a_slow_peer_does_not_hold_up_the_others(autojump_clock, swarm: Swarm) -> None:
    swarm.takes[ONE] = 9
    swarm.join(ONE)
    swarm.join(TWO)
    swarm.push.changed()
    await trio.sleep(5)
    assert {peer for _, peer in swarm.got} == {ONE, TWO}
    swarm.push.changed()  # while the slow one is still at it
    await trio.sleep(20)
    assert len(swarm.got) == 4


async def test_few_are_told_at_a_time(autojump_clock, swarm: Swarm, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "IDENTIFY_PUSHES_AT_ONCE", 2)
    for i in range(6):
        peer = PeerId(b"\x12\x20" + bytes([i]) * 32)
        swarm.takes[peer] = 1
        swarm.join(peer)
    swarm.push.changed()
    await trio.sleep(100)
    assert sorted(when for when, _ in swarm.got) == [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]


# --- over sockets


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "IDENTIFY_PUSH_SECONDS", 0.02)


async def introduce(one: Libp2pHost, two: Libp2pHost) -> None:
    await one.connect(two.addresses()[0])
    await until(lambda: bool(one.description(two.peer_id) and two.description(one.peer_id)))


async def test_handlers_that_come_and_go(quick, server: Libp2pHost, client: Libp2pHost) -> None:
    await introduce(client, server)

    def served() -> bool:
        return "Late.run" in client.description(server.peer_id).protocols

    assert not served()
    server.serve("Late.run", echo)
    await until(served)
    server.unserve("Late.run")
    await until(lambda: not served())


async def test_new_addresses(quick, server: Libp2pHost, client: Libp2pHost, monkeypatch) -> None:
    """A machine that got another lease: peers that are connected hear of it."""
    await introduce(client, server)
    before = server.addresses()
    monkeypatch.setattr(defaults, "INTERFACES_SECONDS", 0.01)
    moved = [parse_listen_address("/ip4/192.0.2.9/tcp/31330")]
    monkeypatch.setattr(own_addresses, "reachable_forms", lambda _: moved)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.follow_interfaces)
        address = f"/ip4/192.0.2.9/tcp/31330/p2p/{server.peer_id}"
        await until(lambda: address in client.known_addresses(server.peer_id))
        nursery.cancel_scope.cancel()
    assert server.addresses() == [address] != before


async def test_a_machine_that_moves_is_noticed_whatever_it_announces(monkeypatch) -> None:
    """What it announces stays. Which private networks it is part of does not, nor whether the address still leads here."""
    monkeypatch.setattr(defaults, "INTERFACES_SECONDS", 0.01)
    announced = "/ip4/203.0.113.9/tcp/4001"
    async with open_host(HostConfig(Identity.generate("ed25519"), announce=[announced])) as host:
        before, vicinity = host.addresses(), host._vicinity
        changed = host.introductions._push._version
        moved = [parse_listen_address("/ip4/192.0.2.9/tcp/31330")]
        monkeypatch.setattr(own_addresses, "reachable_forms", lambda _: moved)
        with trio.fail_after(5):
            await host.own.wait_changed()
        assert host._vicinity is not vicinity
        assert host.addresses() == before
        assert host.introductions._push._version == changed  # nobody is told anything new


async def test_peers_that_take_no_pushes_get_none(quick, server: Libp2pHost, client: Libp2pHost) -> None:
    client.unserve(IDENTIFY_PUSH)
    await introduce(client, server)
    sent = []
    server.introductions._push._send = sent.append
    server.serve("Late.run", echo)
    await trio.sleep(0.1)
    assert sent == []


async def test_a_peer_that_breaks_off_is_no_trouble(quick, server: Libp2pHost, client: Libp2pHost) -> None:
    pushes = 0

    async def refuse(stream) -> None:
        nonlocal pushes
        pushes += 1
        await stream.reset()

    client.unserve(IDENTIFY_PUSH)
    client.serve(IDENTIFY_PUSH, refuse)
    await introduce(client, server)
    server.serve("Late.run", echo)
    await until(lambda: pushes == 1)
    server.serve("Later.run", echo)
    await until(lambda: pushes == 2)
    stream = await client.open_stream(server.peer_id, "Later.run")
    await stream.write(b"x")
    assert await stream.read(1) == b"x"
    assert IDENTIFY in server.description(client.peer_id).protocols
