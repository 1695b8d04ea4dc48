"""How dials ended, address by address, and when one that failed is worth another. No I/O."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.wire.peer_id import PeerId

HopTimes = tuple[tuple[str, float], ...]
"""The hops of a dial in order, each with the seconds it took."""

_MAX_DOUBLINGS = 32  # far beyond any cap; keeps the power finite


@dataclass(frozen=True)
class DialResult:
    """How the last dial of one address of a peer ended.

    ``error`` is empty when it led to a connection, else what happened at ``hop``. ``failures`` are those since the
    last success; ``times`` has the hops that were reached. ``at`` and ``retry_at`` are seconds of the trio clock;
    before the latter the address is left alone.
    """

    address: Address
    hop: str
    error: str
    failures: int
    at: float
    retry_at: float
    times: HopTimes = ()


class DialHistory:
    """The last result of each address. Bounded; forgets the peer dialled longest ago.

    After a failure an address is left alone for a random time, between half of a bound and the bound, which
    doubles with each further one from 2 s to 2 minutes.
    """

    def __init__(
        self, *, clock: Callable[[], float] = trio.current_time, rng: random.Random | None = None
    ) -> None:
        self._clock = clock
        self._rng = random.Random() if rng is None else rng
        self._peers: OrderedDict[PeerId, dict[Address, DialResult]] = OrderedDict()

    def of(self, peer: PeerId) -> list[DialResult]:
        """The last result of each address of ``peer`` that was dialled, the latest last."""
        return list(self._peers.get(peer, {}).values())

    def unreachable(self) -> list[tuple[PeerId, DialResult]]:
        """Peers of which no address led to a connection when it was last dialled, with the latest failure; that dialled
        last comes first."""
        return [
            (peer, results[-1])
            for peer, known in reversed(self._peers.items())
            if (results := list(known.values())) and all(result.error for result in results)
        ]

    def waiting(self, peer: PeerId, address: Address) -> DialResult | None:
        """The failure for which ``address`` is left alone now; None if it may be dialled."""
        result = self._peers.get(peer, {}).get(address)
        return result if result is not None and result.retry_at > self._clock() else None

    def seconds_left(self, result: DialResult) -> float:
        """How long the address is still left alone."""
        return max(0.0, result.retry_at - self._clock())

    def succeeded(self, peer: PeerId, address: Address, times: HopTimes = ()) -> None:
        """Note that ``address`` led to ``peer``."""
        now = self._clock()
        self._note(peer, DialResult(address, "", "", 0, now, now, times))

    def failed(self, peer: PeerId, address: Address, hop: str, error: str, times: HopTimes = ()) -> None:
        """Note that it did not."""
        before = self._peers.get(peer, {}).get(address)
        failures = 1 if before is None else before.failures + 1
        bound = min(
            defaults.DIAL_MAX_BACKOFF_SECONDS,
            defaults.DIAL_BACKOFF_SECONDS * 2 ** min(failures - 1, _MAX_DOUBLINGS),
        )
        now = self._clock()
        wait = self._rng.uniform(bound / 2, bound)
        self._note(peer, DialResult(address, hop, error, failures, now, now + wait, times))

    def forgive(self, peer: PeerId, addresses: Iterable[Address]) -> None:
        """Forget the failures of ``addresses``."""
        known = self._peers.get(peer, {})
        for address in addresses:
            known.pop(address, None)

    def _note(self, peer: PeerId, result: DialResult) -> None:
        known = self._peers.setdefault(peer, {})
        self._peers.move_to_end(peer)
        known.pop(result.address, None)
        known[result.address] = result
        if len(known) > defaults.MAX_ADDRESSES_PER_PEER:
            del known[next(iter(known))]
        if len(self._peers) > defaults.MAX_DIALLED_PEERS:
            self._peers.popitem(last=False)
