"""Peers on the machines of the laboratory: hosts and nodes of ours, and stock ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import yaml
from child_processes import Driver, PeerError, Process
from lab import Machine
from stock_swarm import SCRIPTS, START_SECONDS, StockEnvironment

INSIDE = Path(__file__).with_name("inside")
PORT = 4001  # each machine has all ports to itself
EVERYWHERE = f"/ip4/0.0.0.0/tcp/{PORT}"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Peer:
    """A peer on ``machine``; the scripts of ``inside/`` list its commands."""

    id: str
    machine: Machine
    driver: Driver
    at: dict[str, Any] = field(default_factory=dict)  # which one of its script

    @property
    def address(self) -> str:
        """Where it listens on its own machine, whatever it announces."""
        return f"{self.machine.at(PORT)}/p2p/{self.id}"

    async def do(self, command: str, *, within: float = 60.0, **arguments: Any) -> Any:
        """Run a command and return its result. Raises PeerError with the script's error; ProcessFailed."""
        return await self.driver.aask(command, within=within, **self.at, **arguments)


async def our_peer(machine: Machine, *, name: str = "ours", **options: Any) -> Peer:
    """A host of ours on ``machine``. ``options``: fields of HostConfig; it listens on PORT unless told otherwise.

    Another one of the same name on the same machine has the same identity.
    """
    path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    driver = machine.driver(name, [sys.executable, INSIDE / "our_peer.py"], env=env)
    key = machine.work / f"{machine.name}-{name}.key"
    started = await driver.aask("start", **{"key": str(key), "listen": [EVERYWHERE], **options})
    return Peer(started["peer"], machine, driver)


class StockPeers:
    """One process for all stock peers of all tests; their daemons run on the machines."""

    def __init__(self, stock: StockEnvironment) -> None:
        env = {**stock.variables, "PYTHONPATH": str(SCRIPTS)}
        argv = [stock.python, INSIDE / "stock_peers.py"]
        self.driver = Driver("stock-peers", argv, env=env, log=stock.work / "stock-peers.log")

    async def start(self, machine: Machine, **options: Any) -> Peer:
        """A stock peer on ``machine``. ``options``: of hivemind.P2P.create; it listens on PORT unless told otherwise,
        neither asks a router for a port nor offers others to dial them back, and relays for nobody."""
        quiet = {"nat_port_map": False, "auto_nat": False}
        chosen = {"host_maddrs": [EVERYWHERE], **quiet, **options}
        started = await self.driver.aask("start", namespace=machine.path, within=START_SECONDS, **chosen)
        return Peer(started["peer"], machine, self.driver, {"at": started["at"]})


def our_node(machine: Machine, name: str, **config: Any) -> Process:
    """``kwaainet-bridge run`` on ``machine``; it listens on PORT. ``config``: further keys of its YAML file.

    Returns at once; ``wait_for_node`` waits until it has started.
    """
    settings = {
        "identity": {"path": f"{name}.key", "kind": "ed25519"},
        "listen": [EVERYWHERE],
        "log": {"format": "json"},
        **config,
    }
    file = machine.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    argv = [Path(sys.executable).with_name("kwaainet-bridge"), "run", "-c", file]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return machine.process(name, argv, env=env)


async def said(process: Process, pattern: str, *, within: float = START_SECONDS) -> str:
    """The first match of ``pattern`` (its first group, if it has one) in what the process printed or will print."""
    match = await trio.to_thread.run_sync(process.wait_for, pattern, within, abandon_on_cancel=True)
    return match[match.re.groups and 1]


async def eventually(
    asked: Peer, command: str, good: Callable[[Any], bool], /, *, within: float, **arguments: Any
) -> Any:
    """Ask until the answer is good, for what a peer has no event for; an error is one that is not.

    Raises AssertionError with the last answer.
    """
    answer: Any = None
    with trio.move_on_after(within):
        while True:
            try:
                answer = await asked.do(command, **arguments)
            except PeerError as e:
                answer = e
            else:
                if good(answer):
                    return answer
            await trio.sleep(POLL_SECONDS)
    raise AssertionError(
        f"{asked.machine.name}: {command} {arguments} gave {answer!r} until {within:g} s had passed"
    )
