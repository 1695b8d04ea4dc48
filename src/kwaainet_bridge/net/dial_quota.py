"""How often strangers can have this host dial at addresses that they name. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from kwaainet_bridge.wire.peer_id import PeerId


class DialQuota:
    """At most ``number`` dials within ``seconds``, and ``per_peer`` for each peer.

    Identities cost nothing, so it is the first that bounds what strangers can do; the second leaves others some.
    """

    def __init__(
        self, number: int, *, per_peer: int, seconds: float, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._number = number
        self._per_peer = per_peer
        self._seconds = seconds
        self._clock = clock
        self._recent: deque[tuple[float, PeerId]] = deque()

    def take(self, peer: PeerId) -> bool:
        """Whether there may be a dial for ``peer`` now; if so, it counts."""
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - self._seconds:
            self._recent.popleft()
        if (
            len(self._recent) >= self._number
            or sum(other == peer for _, other in self._recent) >= self._per_peer
        ):
            return False
        self._recent.append((now, peer))
        return True
