"""A bounded number of things that peers share, so that no few of them can take it all."""

from __future__ import annotations

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
        self._held: dict[PeerId, int] = {}

    def held(self, peer: PeerId) -> int:
        """What ``peer`` has."""
        return self._held.get(peer, 0)

    def reserve(self, peer: PeerId, amount: int) -> bool:
        """Take ``amount``, above zero, for ``peer``. False, and nothing is taken, if it would have too much."""
        held = self._held.get(peer, 0) + amount
        if held > self.limit - self.used or held > self.per_peer:
            return False
        self._held[peer] = held
        self.used += amount
        return True

    def release(self, peer: PeerId, amount: int) -> None:
        """Give back what was reserved."""
        self.used -= amount
        held = self._held.get(peer, 0) - amount
        if held:
            self._held[peer] = held
        else:
            self._held.pop(peer, None)

    def __len__(self) -> int:
        """Peers that have something."""
        return len(self._held)
