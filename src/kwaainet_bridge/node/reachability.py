"""Knowing whether others can dial this node, and doing something about it if they cannot."""

from __future__ import annotations

import random

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.experts.methods import RPC_CHECK
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.net.addresses import private_block
from kwaainet_bridge.net.autonat import AUTONAT, AutoNatService
from kwaainet_bridge.net.probe import dial_anew
from kwaainet_bridge.net.reachability import Check, Reachability, Verdict
from kwaainet_bridge.node.probe import DialledBack, ask_to_dial
from kwaainet_bridge.node.readiness import REACHABLE
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.wire.peer_id import PeerId

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_REMEDY = (
    "forward its TCP port in the router and open it in the firewall, set announce if the port outside is another, "
    "or name relays under reachability.relays"
)


class ReachabilityWatch:
    """Has peers dial this node back, keeps the verdict, and takes places at relays while it is private.

    Peers are asked by AutoNAT; those that cannot tell so (stock daemons dial no private address) by Petals' own check.
    The verdict goes to ``state``. With ``relay_service`` the node relays for others while it is not private itself.
    :meth:`run` must be running.
    """

    def __init__(
        self,
        host: Libp2pHost,
        state: NodeState,
        *,
        relay_service: bool,
        rng: random.Random | None = None,
    ) -> None:
        self._host = host
        self._state = state
        self._relay_service = relay_service
        self._rng = random.Random() if rng is None else rng
        self._reachability = Reachability(listens=host.own.listens)
        self._verdict = Verdict.UNKNOWN
        self._relays = 0
        self._changed = trio.Event()
        self._moved = trio.Event()
        self._turn = trio.Lock()
        host.serve(AUTONAT, AutoNatService(self._seen_at, dial_anew).serve)

    @property
    def verdict(self) -> Verdict:
        return self._verdict

    async def wait_changed(self) -> None:
        """Return once the verdict is another, or the node is reached through other relays."""
        await self._changed.wait()

    async def settle(self) -> None:
        """Try for a first verdict, for at most 25 s; without peers that could tell there is none."""
        with trio.move_on_after(defaults.REACHABILITY_START_SECONDS) as limit:
            async with self._turn:
                if self._verdict is Verdict.UNKNOWN:
                    await self._round()
        if limit.cancelled_caught:
            self._judge()  # by what there is: one peer that does not answer holds up a round

    async def run(self) -> None:
        """Ask and act until cancelled."""
        self._judge()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_addresses)
            while True:
                before = self._verdict
                async with self._turn:
                    await self._round()
                with trio.move_on_after(self._pause(before)):
                    await self._moved.wait()
                self._moved = trio.Event()

    async def _round(self) -> None:
        await self._host.wait_identified()
        await self._ask_peers()
        self._judge()

    def _pause(self, before: Verdict) -> float:
        lost = before is Verdict.PUBLIC is not self._verdict
        if self._verdict is Verdict.UNKNOWN or lost or self._reachability.in_doubt:
            return defaults.REACHABILITY_RETRY_SECONDS
        if self._verdict is Verdict.PUBLIC:
            return defaults.REACHABILITY_PERIOD_SECONDS
        return defaults.PRIVATE_PERIOD_SECONDS

    async def _follow_addresses(self) -> None:
        own = self._host.own
        while True:
            interfaces = own.interfaces
            await own.wait_changed()
            if own.interfaces != interfaces:
                self._reachability.moved()
                self._moved.set()
            if self._relays != len(self._host.traversal.keeper.reservations):
                self._judge()

    # --- asking

    def _seen_at(self, peer: PeerId) -> str:
        connection = self._host.connections.find(peer)
        return "" if connection is None else connection.remote_host

    async def _ask_peers(self) -> None:
        """Ask some connected peers at once, those outside of this network first."""
        if not self._host.own.listens:
            return
        direct = self._host.traversal.direct_peers
        peers = list(dict.fromkeys([*direct(AUTONAT), *direct(RPC_CHECK.name)]))
        self._rng.shuffle(peers)
        peers.sort(key=lambda peer: private_block(self._seen_at(peer)) is not None)
        async with trio.open_nursery() as nursery:
            for peer in peers[: defaults.REACHABILITY_PEERS]:
                nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        outside = private_block(self._seen_at(peer)) is None  # it may leave with its answer
        try:
            found = await ask_to_dial(self._host, peer)
        except (NetworkError, RemoteError) as e:
            log.debug("no check", peer=str(peer), reason=str(e))
        else:
            if found is not None:
                self._note(peer, found, outside=outside)

    def _note(self, peer: PeerId, found: DialledBack, *, outside: bool) -> None:
        log.debug("check", peer=str(peer), method=found.method, reachable=found.reachable, outside=outside)
        check = Check(peer, found.method, found.reachable, outside, trio.current_time(), found.address)
        self._reachability.note(check)

    # --- acting

    def _judge(self) -> None:
        keeper, reachability = self._host.traversal.keeper, self._reachability
        relays, reachability.relays = self._relays, len(keeper.reservations)
        self._relays = reachability.relays
        verdict, evidence = reachability.verdict, reachability.evidence
        private = verdict in (Verdict.RELAYED, Verdict.UNREACHABLE)
        self._host.own.prove(reachability.proved)
        keeper.want(private)
        self._host.traversal.offer(self._relay_service and not private)
        self._state.judge(verdict, evidence)
        if verdict is Verdict.UNREACHABLE:
            self._state.degrade(REACHABLE, f"{evidence}; {_REMEDY}")
        else:
            self._state.recover(REACHABLE)
        if verdict is not self._verdict or relays != self._relays:
            self._verdict = verdict
            self._changed.set()
            self._changed = trio.Event()
