"""Which keys are to be read again, and when. No I/O; times are of any one clock."""

from __future__ import annotations

import heapq
import math

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import DhtId


class RefreshQueue:
    """Keys with the time at which each is due, at most ``max_keys``. A key is held once, at its earliest time."""

    def __init__(self, *, max_keys: int = defaults.DHT_REFRESH_KEYS) -> None:
        self._max_keys = max_keys
        self._times: dict[DhtId, float] = {}
        self._heap: list[tuple[float, DhtId]] = []

    def __len__(self) -> int:
        return len(self._times)

    def schedule(self, key: DhtId, at: float) -> bool:
        """Have ``key`` due at ``at``, or as it is already if that is earlier. False if there is no room."""
        if self._times.get(key, math.inf) <= at:
            return True
        if key not in self._times and len(self._times) >= self._max_keys:
            return False
        self._times[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._times) + 64:
            self._heap = [(time, key) for key, time in self._times.items()]
            heapq.heapify(self._heap)
        return True

    def next_time(self) -> float:
        """When the first key is due; infinite if there is none."""
        while self._heap and self._times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take_due(self, now: float, count: int) -> list[DhtId]:
        """Remove and return up to ``count`` keys that are due, the longest due first."""
        due: list[DhtId] = []
        while len(due) < count and self.next_time() <= now:
            key = heapq.heappop(self._heap)[1]
            del self._times[key]
            due.append(key)
        return due
