"""Telling connected peers when what this host says of itself has changed: identify's push, debounced.

Stock daemons keep the protocols that a peer named when it connected and open streams by that list, without asking
again. Source: libp2p identify specification, ``/ipfs/id/push/1.0.0``; go-libp2p in hivemind 1.1.12's p2pd.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.wire.peer_id import PeerId


class IdentifyPush:
    """Knows which peers were told what, by version.

    ``listeners`` are the connected peers that take pushes; ``send`` sends one, must not raise, and brings its own
    deadline. :meth:`run` must be running.
    """

    def __init__(
        self, listeners: Callable[[], Iterable[PeerId]], send: Callable[[PeerId], Awaitable[None]]
    ) -> None:
        self._listeners = listeners
        self._send = send
        self._version = 0
        self._told: dict[PeerId, int] = {}
        self._wake = trio.Event()

    def changed(self) -> None:
        """Note a change; peers are told of all changes within half a second at once."""
        self._version += 1
        self._wake.set()

    def told(self, peer: PeerId) -> None:
        """Note that ``peer`` is being told everything as it is now."""
        self._told[peer] = self._version

    def described(self, peer: PeerId) -> None:
        """Note that ``peer`` has said whether it takes pushes. It may have asked before the last change."""
        if self._told.setdefault(peer, self._version) < self._version:
            self._wake.set()

    def forget(self, peer: PeerId) -> None:
        """Note that ``peer`` is gone."""
        self._told.pop(peer, None)

    async def run(self) -> None:
        """Push until cancelled. A peer that is slow delays the next round, not others in this one."""
        while True:
            await self._wake.wait()
            await trio.sleep(defaults.IDENTIFY_PUSH_SECONDS)
            self._wake = trio.Event()
            places = trio.CapacityLimiter(defaults.IDENTIFY_PUSHES_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for peer in self._listeners():
                    if self._told.get(peer, -1) < self._version:
                        nursery.start_soon(self._push, peer, places)

    async def _push(self, peer: PeerId, places: trio.CapacityLimiter) -> None:
        async with places:
            if peer not in self._told:  # it has gone meanwhile
                return
            self.told(peer)  # one that fails is told of the next change: it may not listen at all
            await self._send(peer)
