"""How much of what peers send may wait in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.peer_id import PeerId


class ReceiveBudget:
    """Bytes of requests that have arrived and are not done with, by peer and in all."""

    def __init__(
        self,
        *,
        per_peer: int = defaults.PEER_RECEIVE_BYTES,
        in_all: int = defaults.RECEIVE_BYTES,
    ) -> None:
        self._per_peer = per_peer
        self._in_all = in_all
        self._held: dict[PeerId, int] = {}
        self._total = 0

    @contextmanager
    def account(self, peer: PeerId) -> Iterator[Account]:
        """An account of one call of ``peer``; what is left on it is given back at the end of the block."""
        account = Account(self, peer)
        try:
            yield account
        finally:
            account.drop(account.held)

    def change(self, peer: PeerId, count: int) -> None:
        """See :class:`Account`, which calls this."""
        before = self._held.get(peer, 0)
        held = before + count
        # a small allowance is everybody's, so that a few large peers cannot silence the rest
        fits = held <= defaults.PEER_ALLOWANCE_BYTES or self._total + count <= self._in_all
        if count > 0 and (held > self._per_peer or not fits):
            raise RemoteError(f"too many bytes of unanswered requests wait here: {before} of yours")
        self._total += count
        if held:
            self._held[peer] = held
        elif before:
            del self._held[peer]

    @property
    def held(self) -> int:
        """Bytes held now, of all peers."""
        return self._total


class Account:
    """Bytes that one call holds."""

    def __init__(self, budget: ReceiveBudget, peer: PeerId) -> None:
        self.held = 0
        self._budget = budget
        self._peer = peer

    def add(self, count: int) -> None:
        """Account for bytes that have arrived. Raises RemoteError when the peer, or all, would have too many."""
        self._budget.change(self._peer, count)
        self.held += count

    def drop(self, count: int) -> None:
        """Account for bytes that are done with."""
        self._budget.change(self._peer, -count)
        self.held -= count
