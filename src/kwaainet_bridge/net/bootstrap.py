"""Staying connected to bootstrap peers: none of them is needed, all of them are tried for ever."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from kwaainet_bridge.defaults import BOOTSTRAP_MAX_RETRY_SECONDS, BOOTSTRAP_RETRY_SECONDS
from kwaainet_bridge.errors import ConfigError, PeerUnreachable, RemoteError
from kwaainet_bridge.net.addresses import split_peer_address
from kwaainet_bridge.wire.peer_id import PeerId

_MAX_DOUBLINGS = 32  # far beyond any cap; keeps the power finite
_TAG = "bootstrap"


class Connector(Protocol):
    """What the keeper asks of a host."""

    peer_id: PeerId

    async def connect(self, address: str) -> PeerId:
        """Connect, or raise PeerUnreachable."""

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer``."""

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo :meth:`protect`."""


@dataclass(frozen=True)
class BootstrapEvent:
    """What happened at one bootstrap address.

    ``error`` is None when the peer is connected now; else it names the hop that failed, and the next attempt
    follows in ``retry_in`` seconds.
    """

    address: str
    peer: PeerId
    error: PeerUnreachable | None
    retry_in: float = 0.0

    @property
    def connected(self) -> bool:
        return self.error is None


def parse_bootstrap_addresses(addresses: Sequence[str]) -> list[tuple[PeerId, str]]:
    """Split full addresses; ConfigError names the first that cannot be dialled."""
    parsed = []
    for address in addresses:
        try:
            peer, _ = split_peer_address(address)
        except RemoteError as e:
            raise ConfigError(f"bootstrap {e}") from e
        parsed.append((peer, address))
    return parsed


async def keep_bootstrapped(
    host: Connector,
    addresses: Sequence[str],
    *,
    on_event: Callable[[BootstrapEvent], None],
    rng: random.Random | None = None,
    first_retry: float = BOOTSTRAP_RETRY_SECONDS,
    max_retry: float = BOOTSTRAP_MAX_RETRY_SECONDS,
) -> None:
    """Connect to all of ``addresses`` at once, and again whenever a connection is missing; until cancelled.

    After each failure, and after each connection lost, the wait is random between zero and a bound that
    doubles from ``first_retry`` to ``max_retry`` seconds; a connection that outlives the bound starts it
    anew. Connections to these peers are protected meanwhile. The host's own address is left out. Returns
    when there is nothing to keep. Raises ConfigError for a malformed address.
    """
    rng = random.Random() if rng is None else rng
    keepers = [
        _Keeper(host, peer, address, on_event, rng, first_retry, max_retry)
        for peer, address in parse_bootstrap_addresses(addresses)
        if peer != host.peer_id
    ]
    async with trio.open_nursery() as nursery:
        for keeper in keepers:
            nursery.start_soon(keeper.run)


@dataclass
class _Keeper:
    host: Connector
    peer: PeerId
    address: str
    on_event: Callable[[BootstrapEvent], None]
    rng: random.Random
    first_retry: float
    max_retry: float

    async def run(self) -> None:
        self.host.protect(self.peer, _TAG)
        try:
            await self._keep()
        finally:
            self.host.unprotect(self.peer, _TAG)

    async def _keep(self) -> None:
        attempts = 0
        while True:
            bound = min(self.max_retry, self.first_retry * 2 ** min(attempts, _MAX_DOUBLINGS))
            wait = self.rng.uniform(0, bound)
            began = trio.current_time()
            try:
                await self.host.connect(self.address)
            except PeerUnreachable as e:
                self.on_event(BootstrapEvent(self.address, self.peer, e, wait))
            else:
                self.on_event(BootstrapEvent(self.address, self.peer, None))
                await self.host.wait_disconnected(self.peer)
                if trio.current_time() - began > bound:
                    attempts = -1
            attempts += 1
            await trio.sleep(wait)
