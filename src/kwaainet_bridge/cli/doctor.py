"""``kwaainet-bridge doctor``: how far the way to a bootstrap peer goes, and what mends the step that fails."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final

import trio
import typer

from kwaainet_bridge.cli.printing import printable
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import (
    CallBackFailed,
    ClockSkew,
    ConfigError,
    NetworkError,
    PeerUnreachable,
    RemoteError,
)
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.reachability import ReachabilityService
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.addresses import split_peer_address
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.probe import ask_to_dial, dial_back
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

_DIAL_STEPS: Final = ("dns", "tcp", "noise", "yamux")

REMEDIES: Final = {
    "dns": "check the name's spelling and this machine's name server",
    "tcp": "check that the peer is running and that its port is open in its firewall and forwarded by its router",
    "noise": "check the peer id in the address: the peer has another identity now, or another program listens there",
    "yamux": "check that the peer offers yamux and has room for another connection",
    "identify": "try again later: a peer that does not say who it is within 10 s is overloaded or turns us away",
    "kademlia": "run the peer's libp2p daemon with its DHT in server mode",
    "dht ping": "take the address of a bootstrap peer or server of the swarm: this peer does not answer as one",
    "dial-back": "open the port of --listen in the firewall, forward it in the router, and announce that address",
}
"""What to do when a step fails. The steps are in the order in which they are taken."""

_CLOCK_REMEDY: Final = "set the clocks of both machines by NTP"


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """How one step went. ``seconds`` is None for one that was skipped, ``remedy`` empty unless it failed."""

    name: str
    verdict: Verdict
    seconds: float | None = None
    detail: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "verdict": self.verdict,
            "ms": None if self.seconds is None else round(self.seconds * 1e3, 3),
            "detail": self.detail,
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"{self.seconds * 1e3:.1f} ms"
        text = f"{self.detail}; {self.remedy}" if self.remedy else self.detail
        return f"{self.name:<10}{time:>11}  {self.verdict:<8} {printable(text)}".rstrip()


@dataclass
class Examination:
    """The steps to one peer. ``clock_seconds`` is how far its clock is ahead of ours, None while that is unknown."""

    address: str
    tell: Callable[[Step], None]
    clock_seconds: float | None = None
    steps: list[Step] = field(default_factory=list)

    @property
    def failed(self) -> str | None:
        """The step that failed, if one did."""
        return next((step.name for step in self.steps if step.verdict is Verdict.FAILED), None)

    def add(self, step: Step) -> None:
        self.steps.append(step)
        self.tell(step)

    def skip(self, name: str, why: str) -> None:
        self.add(Step(name, Verdict.SKIPPED, detail=why))

    async def take(self, name: str, check: Callable[[], Awaitable[str]]) -> None:
        """Take a step that returns what is worth telling; skip it if one before it has failed."""
        if self.failed is not None:
            self.skip(name, f"{self.failed} failed")
            return
        began = trio.current_time()
        try:
            verdict, detail, remedy = Verdict.OK, await check(), ""
        except ClockSkew as e:
            self.clock_seconds = e.seconds if math.isfinite(e.seconds) else None
            verdict, detail, remedy = Verdict.FAILED, f"clock {e.seconds:+.1f} s", _CLOCK_REMEDY
        except (NetworkError, RemoteError) as e:
            verdict, detail, remedy = Verdict.FAILED, str(e), REMEDIES[name]
        self.add(Step(name, verdict, trio.current_time() - began, detail, remedy))

    def as_json(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "passed": self.failed is None,
            "clock_seconds": None if self.clock_seconds is None else round(self.clock_seconds, 3),
            "steps": [step.as_json() for step in self.steps],
        }


@dataclass(frozen=True, slots=True)
class Callee:
    """A DHT node of ours that listens, for peers to call back."""

    host: Libp2pHost
    dht: DhtNode

    async def be_called(self, address: str) -> str:
        """Have the peer at ``address`` dial back. Raises CallBackFailed, NetworkError or RemoteError."""
        peer = await self.host.connect(address)
        await self.host.wait_identified()
        found = await ask_to_dial(self.host, peer)
        if found is None:
            await self.dht.check(peer)
            # The DHT lets a peer use the connection that we opened, and stock peers do.
            return "its DHT calls us, over our connection: it dials nobody back who asks for that"
        if not found.reachable:
            raise CallBackFailed(
                f"it dialled us over a connection of its own and did not get through ({found.method})"
            )
        return (
            f"over a connection of its own{f' to {found.address}' if found.address else ''} ({found.method})"
        )


@asynccontextmanager
async def open_callee(listen: str, announce: tuple[str, ...] = ()) -> AsyncIterator[Callee]:
    """Listen until the end of the block. Raises ConfigError for an address that cannot be listened on."""
    config = HostConfig(Identity.generate("ed25519"), listen=(listen,), announce=announce)
    async with open_host(config) as host:
        server = RpcServer(host)
        ReachabilityService(host.peer_id, lambda peer: dial_back(host, peer)).mount(server)
        dht = DhtNode(host, server, RpcClient(host))
        async with dht.running():
            yield Callee(host, dht)


async def examine(
    address: str, *, callee: Callee | None = None, tell: Callable[[Step], None] = lambda _: None
) -> Examination:
    """Take every step to the peer at ``address``, under a throw-away identity; ``tell`` hears of each at once.

    Failures of the peer are in the result. Raises RemoteError for an address that cannot be dialled,
    PeerUnreachable if this machine has no room for a connection. Cancelled: its connections are closed.
    """
    examination = Examination(address, tell)
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        peer, _ = split_peer_address(address)
        await _dial(host, peer, examination)
        await _ask(host, peer, examination)
    if callee is None:
        examination.skip("dial-back", "needs --listen")
    else:
        await examination.take("dial-back", partial(callee.be_called, address))
    return examination


async def _dial(host: Libp2pHost, peer: PeerId, examination: Examination) -> None:
    try:
        await host.connect(examination.address)
    except PeerUnreachable:
        if not host.dial_results(peer):
            raise  # nothing was tried
    result = host.dial_results(peer)[-1]
    times = dict(result.times)
    for name in _DIAL_STEPS:
        if examination.failed is not None:
            examination.skip(name, f"{examination.failed} failed")
        elif name not in times:
            examination.skip(name, "the address holds no name")
        elif name == result.hop:
            examination.add(Step(name, Verdict.FAILED, times[name], result.error, REMEDIES[name]))
        else:
            examination.add(Step(name, Verdict.OK, times[name]))


async def _ask(host: Libp2pHost, peer: PeerId, examination: Examination) -> None:
    dht = DhtNode(host, RpcServer(host), RpcClient(host), client_mode=True)

    async def identify() -> str:
        await host.wait_identified()
        description = host.description(peer)
        if description is None:
            raise NetworkError(f"{peer} does not say who it is")
        return description.agent

    async def find_node() -> str:
        found = await host.kademlia.ask(peer, (), host.peer_id)
        return f"peers named: {len(found)}"

    async def ping() -> str:
        pong = await dht.check(peer)
        examination.clock_seconds = pong.ahead
        return "" if pong.ahead is None else f"clock {pong.ahead:+.3f} s"

    await examination.take("identify", identify)
    await examination.take("kademlia", find_node)
    async with dht.running():
        await examination.take("dht ping", ping)


async def examine_peers(config: NodeConfig, listen: str | None, as_json: bool) -> bool:
    """Examine the bootstrap peers of the Petals network one after the other and print it; True if all passed.

    Raises ConfigError if there is no peer, or for an address that cannot be listened on.
    """
    network = config.networks.petals
    if network is None or not network.bootstrap:
        raise ConfigError("no peer to examine: give an address, or networks.petals.bootstrap in the file")
    if listen is None:
        examinations = await _examine_all(network.bootstrap, None, as_json)
    else:
        async with open_callee(listen, config.announce) as callee:
            examinations = await _examine_all(network.bootstrap, callee, as_json)
    passed = all(examination.failed is None for examination in examinations)
    if as_json:
        peers = [examination.as_json() for examination in examinations]
        typer.echo(json.dumps({"passed": passed, "peers": peers}))
    return passed


async def _examine_all(addresses: tuple[str, ...], callee: Callee | None, as_json: bool) -> list[Examination]:
    examinations = []
    for address in addresses:
        if as_json:
            examinations.append(await examine(address, callee=callee))
        else:
            typer.echo(f"peer      {address}")
            examinations.append(
                await examine(address, callee=callee, tell=lambda step: typer.echo(str(step)))
            )
    return examinations
