"""A bounded number of things that peers share, so that no few of them can take it all."""

from __future__ import annotations

from weakref import WeakValueDictionary

from kwaainet_bridge.wire.peer_id import PeerId


class FairPool:
    """``limit`` bytes, streams, or whatever is counted.

    A peer gets nothing that would give it more than is free: one alone gets half of the pool, two get a third
    each, and so on. However many are greedy, something is left for one who wants little. With ``per_peer`` that
    is a limit, too.
    """

    def __init__(self, limit: int, *, per_peer: int | None = None) -> None:
        self.limit = limit
        self.per_peer = limit if per_peer is None else per_peer
        self.used = 0
        self._shares: WeakValueDictionary[PeerId, Share] = WeakValueDictionary()

    @property
    def free(self) -> int:
        """What nobody holds."""
        return self.limit - self.used

    def share(self, peer: PeerId) -> Share:
        """The share of ``peer``: the same object for as long as anybody holds it."""
        share = self._shares.get(peer)
        if share is None:
            self._shares[peer] = share = Share(self)
        return share

    def __len__(self) -> int:
        """Shares that somebody holds."""
        return len(self._shares)


class Share:
    """What one peer has of a :class:`FairPool`; made by that only."""

    def __init__(self, pool: FairPool) -> None:
        self.held = 0
        self._pool = pool

    def reserve(self, amount: int) -> bool:
        """Take ``amount``, above zero. False, and nothing is taken, if the peer would have more than its
        part."""
        pool = self._pool
        if self.held + amount > min(pool.per_peer, pool.free):
            return False
        self.held += amount
        pool.used += amount
        return True

    def release(self, amount: int) -> None:
        """Give back what was reserved."""
        self.held -= amount
        self._pool.used -= amount
