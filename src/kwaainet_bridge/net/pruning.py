"""Which connections can go when there are many: idle ones that nobody asked to keep. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from kwaainet_bridge.wire.peer_id import PeerId


class Prunable(Protocol):
    """What is asked of a connection."""

    remote: PeerId
    initiator: bool
    opened_at: float

    @property
    def in_use(self) -> bool:
        """Whether a stream is open that is more than housekeeping."""

    @property
    def leaving(self) -> bool:
        """Whether it is being closed already."""

    @property
    def used_at(self) -> float:
        """When it was last in use, or opened."""


P = TypeVar("P", bound=Prunable)


class Protection:
    """Peers whose connections are kept, each for one or more reasons."""

    def __init__(self) -> None:
        self._tags: dict[PeerId, Counter[str]] = {}

    def add(self, peer: PeerId, tag: str) -> None:
        """Keep ``peer``, until ``remove`` was called as often for this tag."""
        self._tags.setdefault(peer, Counter())[tag] += 1

    def remove(self, peer: PeerId, tag: str) -> None:
        """Undo one ``add``. ValueError if there was none."""
        tags = self._tags.get(peer)
        if tags is None or not tags[tag]:
            raise ValueError(f"{peer} is not protected as {tag!r}")
        tags[tag] -= 1
        if not +tags:
            del self._tags[peer]

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._tags


def expendable(connections: Iterable[P], protection: Protection, *, opened_before: float) -> list[P]:
    """The connections that can go, the least valuable first.

    Neither those in use nor those to protected peers nor those opened after ``opened_before``. Inbound ones
    come before outbound ones, since strangers can make any number of those; then by how long they are unused.
    """
    idle = [
        connection
        for connection in connections
        if connection.opened_at <= opened_before
        and not connection.leaving
        and connection.remote not in protection
        and not connection.in_use
    ]
    return sorted(idle, key=lambda connection: (connection.initiator, connection.used_at))


def preferred(own: PeerId, connections: Iterable[P], *, simultaneous: float) -> P | None:
    """The connection that new streams use, of several to one peer in the order they were opened.

    When both sides dial at once, both prefer the connection that the smaller peer id dialled. A connection
    that came more than ``simultaneous`` seconds after another replaces it: its peer would have used the older
    one if it still had it.
    """
    best: P | None = None
    for connection in connections:
        if (
            best is None
            or connection.opened_at - best.opened_at > simultaneous
            or _by_smaller(own, connection) >= _by_smaller(own, best)
        ):
            best = connection
    return best


def _by_smaller(own: PeerId, connection: Prunable) -> bool:
    return connection.initiator == (own < connection.remote)
