"""Which connections can go when there are many: idle ones that nobody asked to keep, strangers' first. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.membership import Membership
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
    def used(self) -> bool:
        """Whether one has ended that was of use to the peer as a member of a network."""

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


class Pruning:
    """Says which connections a host can do without.

    A connection *belongs* to this host if its peer is of one of the host's networks or is protected, or if it has
    carried a stream that is more than housekeeping. One that does not, and has had its time to, is a stranger's: public
    networks are full of peers that come across a node and want nothing from it, or no more than a relay.
    """

    def __init__(self, limits: Limits, membership: Membership) -> None:
        self.protection = Protection()
        self.limits = limits
        self._membership = membership

    @property
    def few(self) -> int:
        """With no more connections than this, none has to go."""
        return min(self.limits.most_strangers, self.limits.high) if self._membership else self.limits.high

    def expendable(self, connections: Iterable[P], *, opened_before: float) -> list[P]:
        """The connections that can go, the least valuable first.

        Neither those in use nor those to protected peers nor those opened after ``opened_before``. First those that
        belong to nobody; then what networks have beyond their quotas; then the others. Among these, inbound ones
        come before outbound ones, since strangers can make any number of those; then by how long they are unused.
        """
        staying = [connection for connection in connections if not connection.leaving]
        idle = [
            connection
            for connection in staying
            if connection.opened_at <= opened_before
            and connection.remote not in self.protection
            and not connection.in_use
        ]
        idle.sort(key=lambda connection: (connection.initiator, connection.used_at))
        strange, beyond, rest = [], [], []
        excess = self._excess(staying)
        for connection in idle:
            network = self._membership.of(connection.remote)
            if not self._belongs(connection):
                strange.append(connection)
            elif network is not None and excess[network] > 0:
                excess[network] -= 1
                beyond.append(connection)
            else:
                rest.append(connection)
        return strange + beyond + rest

    def surplus(self, connections: Iterable[P], *, opened_before: float) -> list[P]:
        """The connections that should go: strangers' beyond their number, and idle ones above the high watermark.

        However many strangers there are, they cost nobody else a connection: what belongs goes only when that alone is
        above the watermark. Those opened after ``opened_before`` stay, and count only if they belong.
        """
        staying = [connection for connection in connections if not connection.leaving]
        if len(staying) <= self.few:
            return []
        members = strangers = 0
        for connection in staying:
            if self._belongs(connection):
                members += 1
            elif connection.opened_at <= opened_before:
                strangers += 1
        number = 0
        if members + strangers > self.limits.high:
            number = members + strangers - self.limits.low
        if members <= self.limits.high:
            number = min(number, strangers)
        if self._membership:
            number = max(number, strangers - self.limits.most_strangers)
        return self.expendable(staying, opened_before=opened_before)[:number] if number else []

    def _belongs(self, connection: P) -> bool:
        return (
            self._membership.of(connection.remote) is not None
            or connection.used
            or connection.remote in self.protection
            or connection.in_use
        )

    def _excess(self, staying: Iterable[P]) -> Counter[str]:
        """How many connections each network has beyond its quota; those without a quota have none."""
        quotas = self.limits.connections_per_network
        counts = Counter(self._membership.of(connection.remote) for connection in staying) if quotas else {}
        return Counter({network: counts.get(network, 0) - quota for network, quota in quotas.items()})


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
