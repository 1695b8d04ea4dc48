"""Staying in touch with a network's bootstrap peers, and saying what stands in the way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ClockSkew, NetworkError
from kwaainet_bridge.hivemind.dht import BootstrapResult
from kwaainet_bridge.net import Host
from kwaainet_bridge.net.bootstrap import BootstrapEvent, keep_bootstrapped, parse_bootstrap_addresses
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.wire.peer_id import PeerId

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Join = Callable[[Sequence[PeerId]], Awaitable[Sequence[BootstrapResult]]]
"""Joins the DHT through connected peers."""


class BootstrapWatch:
    """Keeps a network's bootstrap peers connected, joins its DHT through them, and tells how that goes.

    None of the peers is fatal. Each failure is logged with its hop (address, dns, tcp, noise, yamux, protocol,
    dht). While none is reached the node is degraded.
    """

    def __init__(
        self,
        network: str,
        host: Host,
        addresses: Sequence[str],
        state: NodeState,
        *,
        join: Join | None = None,
    ) -> None:
        self.network = network
        self.reached: set[PeerId] = set()
        self._addresses = addresses
        self._peers = {peer for peer, _ in parse_bootstrap_addresses(addresses)} - {host.peer_id}
        self._untried = set(self._peers)
        self._turns = {peer: trio.Lock() for peer in self._peers}
        self._round_over = trio.Event()
        self._host = host
        self._state = state
        self._join = join
        if not self._peers:
            self._round_over.set()

    @property
    def total(self) -> int:
        """How many peers there are to reach."""
        return len(self._peers)

    async def first_round(self) -> None:
        """Return once every peer was tried once, or ``defaults.BOOTSTRAP_ROUND_SECONDS`` are over."""
        with trio.move_on_after(defaults.BOOTSTRAP_ROUND_SECONDS):
            await self._round_over.wait()

    def check_reached(self) -> None:
        """Raise NetworkError if there are bootstrap peers and none is in touch: then the DHT tells little of others."""
        if self._peers and not self.reached:
            raise NetworkError(self._nobody())

    async def run(self) -> None:
        """Keep in touch until cancelled."""
        async with trio.open_nursery() as nursery:

            def on_event(event: BootstrapEvent) -> None:
                if event.error is None:
                    nursery.start_soon(self._stay, event.peer)
                else:
                    self._failed(event.peer, event.error.hop, str(event.error), event.retry_in)

            await keep_bootstrapped(self._host, self._addresses, on_event=on_event)

    async def _stay(self, peer: PeerId) -> None:
        """Join through a peer that is connected; return when it no longer is.

        A peer with several addresses is reported once for each: one at a time looks after it.
        """
        async with self._turns[peer]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._join_through, peer)
                await self._host.wait_disconnected(peer)
                nursery.cancel_scope.cancel()
            if peer in self.reached:
                self.reached.discard(peer)
                log.warning("bootstrap peer lost", network=self.network, peer=str(peer))
                self._state.note("bootstrap", f"{self.network}: {peer.short} is lost")
                self._judge()

    async def _join_through(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()  # one that is gone again is not reached
        while self._join is not None:
            error = (await self._join([peer]))[0].error
            if error is None:
                self._state.hear_clock(peer, 0.0)
                break
            if isinstance(error, ClockSkew):
                self._state.hear_clock(peer, error.seconds)
            self._failed(peer, "dht", str(error), defaults.DHT_JOIN_RETRY_SECONDS)
            await trio.sleep(defaults.DHT_JOIN_RETRY_SECONDS)
        self.reached.add(peer)
        log.info(
            "bootstrap peer reached",
            network=self.network,
            peer=str(peer),
            reached=f"{len(self.reached)}/{len(self._peers)}",
        )
        self._state.note("bootstrap", f"{self.network}: {peer.short} is reached")
        self._tried(peer)

    def _failed(self, peer: PeerId, hop: str, reason: str, retry_in: float) -> None:
        log.warning(
            "bootstrap peer not reached",
            network=self.network,
            peer=str(peer),
            hop=hop,
            reason=reason,
            retry_in_seconds=round(retry_in, 1),
        )
        self._tried(peer)

    def _tried(self, peer: PeerId) -> None:
        self._untried.discard(peer)
        if not self._untried:
            self._round_over.set()
        self._judge()

    def _judge(self) -> None:
        condition = f"bootstrap {self.network}"
        if self.reached:
            self._state.recover(condition)
        elif not self._untried:
            self._state.degrade(condition, self._nobody())

    def _nobody(self) -> str:
        return f"none of {len(self._peers)} bootstrap peers is reached"
