"""Which peer sent what is stored, and how much of the room each has taken. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kwaainet_bridge.wire.peer_id import PeerId

Place = TypeVar("Place", bound=Hashable)


@dataclass(slots=True)
class _Share(Generic[Place]):
    used: int = 0
    places: dict[Place, None] = field(default_factory=dict)  # the longest held first


class Shares(Generic[Place]):
    """Bytes and places by sender."""

    def __init__(self) -> None:
        self._shares: dict[PeerId, _Share[Place]] = {}
        # of (-bytes, peer); rows that are no longer true are passed over and rebuilt when they are most of it
        self._heap: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self._shares)

    def used(self, sender: PeerId) -> int:
        share = self._shares.get(sender)
        return 0 if share is None else share.used

    def add(self, sender: PeerId, place: Place, size: int) -> None:
        share = self._shares.setdefault(sender, _Share())
        share.used += size
        share.places[place] = None
        self._note(sender, share)

    def remove(self, sender: PeerId, place: Place, size: int) -> None:
        share = self._shares[sender]
        share.used -= size
        del share.places[place]
        if share.places:
            self._note(sender, share)
        else:
            del self._shares[sender]

    def heaviest(self) -> tuple[PeerId, Place] | None:
        """The sender that uses most, and the place that it has held longest."""
        while self._heap:
            used, raw = self._heap[0]
            sender = PeerId(raw)
            share = self._shares.get(sender)
            if share is not None and share.used == -used:
                return sender, next(iter(share.places))
            heapq.heappop(self._heap)
        return None

    def _note(self, sender: PeerId, share: _Share[Place]) -> None:
        heapq.heappush(self._heap, (-share.used, sender.raw))
        if len(self._heap) > 2 * len(self._shares) + 64:
            self._heap = [(-share.used, sender.raw) for sender, share in self._shares.items()]
            heapq.heapify(self._heap)
