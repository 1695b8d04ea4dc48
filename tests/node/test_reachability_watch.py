"""When a node has itself dialled back, by whom, and what it does with the answers; in simulated time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.autonat import AUTONAT
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node import reachability
from kwaainet_bridge.node.probe import DialledBack
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.wire.peer_id import PeerId


class Own:
    """What the host says of its own addresses."""

    listens = True

    def __init__(self) -> None:
        self.interfaces: tuple[Address, ...] = ()
        self.proved: list[Address] = []
        self._changed = trio.Event()

    def prove(self, addresses: list[Address]) -> None:
        self.proved = addresses

    def move(self) -> None:
        self.interfaces = (Address("ip4", "10.9.9.9", 1),)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        await self._changed.wait()


class World:
    """A host whose connected peers, named by where they are seen, answer as ``answers`` says or never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: bool | None) -> None:
        self.answers = {host.replace("_", ".").lstrip("a"): answer for host, answer in answers.items()}
        self.seen = {PeerId(b"\x12\x20" + bytes([n]) * 32): host for n, host in enumerate(self.answers)}
        self.asked: list[tuple[float, str]] = []
        self.leaves: str | None = None
        self.own = Own()
        self.keeper = SimpleNamespace(reservations=[], want=lambda _: None)
        monkeypatch.setattr(reachability, "ask_to_dial", self._ask)
        self.state = NodeState()
        self.watch = ReachabilityWatch(self, self.state, relay_service=True, rng=random.Random(1))

    @property
    def traversal(self) -> SimpleNamespace:
        return SimpleNamespace(
            keeper=self.keeper,
            offer=lambda _: None,
            direct_peers=lambda protocol: list(self.seen) if protocol == AUTONAT else [],
        )

    @property
    def connections(self) -> SimpleNamespace:
        return SimpleNamespace(
            find=lambda peer: SimpleNamespace(remote_host=self.seen[peer]) if peer in self.seen else None
        )

    def serve(self, protocol: str, _handler: object) -> None:
        assert protocol == AUTONAT

    async def wait_identified(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _ask(self, _host: object, peer: PeerId) -> DialledBack:
        host = self.seen[peer]
        self.asked.append((trio.current_time(), host))
        answer = self.answers[host]
        if answer is None:
            await trio.sleep(40)
            raise NetworkError("no answer")
        if host == self.leaves:
            del self.seen[peer]
        return DialledBack("AutoNAT", answer)


@asynccontextmanager
async def watching(world: World) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.watch.run)
        yield
        nursery.cancel_scope.cancel()


async def test_a_peer_that_does_not_answer_does_not_keep_the_others_from_counting(
    monkeypatch: pytest.MonkeyPatch, autojump_clock
) -> None:
    world = World(monkeypatch, a8_8_8_1=False, a8_8_8_2=False, a8_8_8_3=None)
    async with watching(world):
        await world.watch.settle()
        assert trio.current_time() == pytest.approx(defaults.REACHABILITY_START_SECONDS)
        assert world.watch.verdict is Verdict.UNREACHABLE


async def test_a_failed_check_is_followed_by_another_soon(
    monkeypatch: pytest.MonkeyPatch, autojump_clock
) -> None:
    world = World(monkeypatch, a8_8_8_1=True)
    async with watching(world):
        await trio.sleep(1)
        world.answers["8.8.8.1"] = False
        await trio.sleep(defaults.REACHABILITY_PERIOD_SECONDS)
        assert world.watch.verdict is Verdict.PUBLIC
        await trio.sleep(defaults.REACHABILITY_RETRY_SECONDS)
        times = [at for at, _ in world.asked]
        assert times == pytest.approx([0, 600, 605])
        assert world.watch.verdict is Verdict.UNREACHABLE


async def test_after_a_move_peers_are_asked_at_once(monkeypatch: pytest.MonkeyPatch, autojump_clock) -> None:
    world = World(monkeypatch, a8_8_8_1=True, a8_8_8_2=True)
    async with watching(world):
        await trio.sleep(100)
        world.answers.update({"8.8.8.1": False, "8.8.8.2": False})
        world.own.move()
        await trio.sleep(1)
        assert world.watch.verdict is Verdict.UNREACHABLE


async def test_peers_outside_are_asked_first(monkeypatch: pytest.MonkeyPatch, autojump_clock) -> None:
    neighbours = {f"a192_168_1_{n}": True for n in range(20)}
    world = World(monkeypatch, **neighbours, a8_8_8_1=False)
    async with watching(world):
        for _ in range(20):
            await trio.sleep(defaults.PRIVATE_PERIOD_SECONDS)
            assert world.watch.verdict is Verdict.UNREACHABLE
    assert len(world.asked) >= 20 * defaults.REACHABILITY_PEERS


async def test_a_neighbour_that_leaves_with_its_answer_was_a_neighbour(
    monkeypatch: pytest.MonkeyPatch, autojump_clock
) -> None:
    world = World(monkeypatch, a8_8_8_1=False, a192_168_1_2=True)
    world.leaves = "192.168.1.2"
    async with watching(world):
        await trio.sleep(1)
        assert world.watch.verdict is Verdict.UNREACHABLE
