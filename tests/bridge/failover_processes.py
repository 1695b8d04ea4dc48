"""Daemons as processes, in one network or both, that are killed in turn while one client generates through them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from child_processes import Process
from failover_world import LOOPBACK, both_networks, chain_of, peers_in, tokens_of
from node_support import PREFIX
from our_nodes import start_node, wait_until_ready
from simulator import TINY, simulated_bootstrap

from kwaainet_bridge.engine import ClientModel
from kwaainet_bridge.hivemind.client import InferenceSession
from kwaainet_bridge.hivemind.peer import open_peer

KINDS = (("petals",), ("kwaainet",), ("petals", "kwaainet"))
"""In which networks the three servers are; whoever takes the place of one is in the same."""


@dataclass
class Outcome:
    """What came of a text. ``pauses``: seconds before each token but the first; ``killed``: in which network each victim
    was in use when it was killed by SIGKILL."""

    tokens: list[int]
    pauses: list[float]
    killed: list[str] = field(default_factory=list)


class Daemons:
    """Running daemons by their peer ids. Starting one takes seconds, in a thread: the bootstrap peers are here."""

    def __init__(self, folder: Path, networks: dict[str, dict[str, Any]]) -> None:
        self._folder = folder
        self._networks = networks
        self._numbers = itertools.count()
        self._running: dict[str, tuple[Process, tuple[str, ...]]] = {}

    async def start(self, kind: tuple[str, ...]) -> None:
        name = f"daemon-{next(self._numbers)}"
        networks = {"petals": None, "kwaainet": None} | {which: self._networks[which] for which in kind}
        process = start_node(self._folder, name, model=TINY.folder, prefix=PREFIX, networks=networks)
        try:
            address = await trio.to_thread.run_sync(wait_until_ready, process)
        except BaseException:
            process.kill()
            raise
        self._running[address.rpartition("/p2p/")[2]] = process, kind

    async def kill(self, peer: str) -> tuple[str, ...]:
        """SIGKILL; the networks in which it was."""
        process, kind = self._running.pop(peer)
        await trio.to_thread.run_sync(process.kill)
        return kind

    def kill_all(self) -> None:
        for process, _ in self._running.values():
            process.kill()


@asynccontextmanager
async def three_daemons(folder: Path) -> AsyncIterator[tuple[Daemons, str, str]]:
    """The daemons, and the addresses of the bootstrap peers of Petals and KwaaiNet."""
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(open_peer(listen=LOOPBACK))
        kwaai_boot = await stack.enter_async_context(simulated_bootstrap())
        address = boot.host.addresses()[0]
        networks = {
            "petals": {"bootstrap": [address]},
            "kwaainet": {"bootstrap": [kwaai_boot.address], "dht_prefix": TINY.prefix},
        }
        daemons = Daemons(folder, networks)
        stack.callback(daemons.kill_all)
        async with trio.open_nursery() as nursery:
            for kind in KINDS:
                nursery.start_soon(daemons.start, kind)
        yield daemons, address, kwaai_boot.address


async def generate_while_killing(folder: Path, weights: ClientModel, *, tokens: int, every: int) -> Outcome:
    """Greedy tokens; after every so many, the server in use is killed. Another of its kind is started meanwhile, and
    ready before the next is killed. The time in which that is waited for is in no pause."""
    async with (
        three_daemons(folder) as (daemons, petals_boot, kwaai_boot),
        both_networks(petals_boot, kwaai_boot) as swarm,
        trio.open_nursery() as nursery,
    ):
        outcome = Outcome([], [])
        ready = trio.Event()
        ready.set()
        last: float | None = None

        async def replace(kind: tuple[str, ...], started: trio.Event) -> None:
            await daemons.start(kind)
            started.set()

        async def at(done: int, session: InferenceSession) -> None:
            nonlocal last, ready
            now = trio.current_time()
            if last is not None:
                outcome.pauses.append(now - last)
            if done % every == 0 and done < tokens:
                await ready.wait()
                ((network, _, _),) = chain_of(session)
                (victim,) = peers_in(session)
                outcome.killed.append(network)
                ready = trio.Event()
                nursery.start_soon(replace, await daemons.kill(victim), ready)
            last = trio.current_time()

        outcome.tokens = await tokens_of(swarm, weights, tokens, at=at)
        nursery.cancel_scope.cancel()
    return outcome
