"""Whom this node knows and whom it had better leave alone for a while. No I/O."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.routing import Contact, RoutingTable
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Failures:
    count: int
    until: float


class Backoff:
    """Peers that failed: each is left alone for a time that doubles with every failure, up to a limit.

    Source: hivemind 1.1.12, ``dht/node.py`` (5 s, rate 2); the limit and the bounded memory are ours.
    """

    def __init__(
        self,
        *,
        base: float = defaults.DHT_BACKOFF_SECONDS,
        limit: float = defaults.DHT_BACKOFF_LIMIT_SECONDS,
        max_peers: int = defaults.DHT_BACKOFF_PEERS,
    ) -> None:
        self._base = base
        self._limit = limit
        self._max_peers = max_peers
        self._failures: OrderedDict[PeerId, _Failures] = OrderedDict()

    def failed(self, peer: PeerId, *, now: float) -> None:
        """Count a failure. One more while the peer is left alone anyway changes nothing."""
        failures = self._failures.get(peer)
        if failures is not None and failures.until > now:
            return
        count = 0 if failures is None else failures.count
        # the exponent is bounded because 2.0**1024 overflows
        pause = min(self._base * 2.0 ** min(count, 64), self._limit)
        self._failures[peer] = _Failures(count + 1, now + pause)
        self._failures.move_to_end(peer)
        if len(self._failures) > self._max_peers:
            self._failures.popitem(last=False)

    def succeeded(self, peer: PeerId) -> None:
        self._failures.pop(peer, None)

    def __contains__(self, peer: PeerId) -> bool:
        """Whether the peer's last call failed; it may be asked again all the same."""
        return peer in self._failures

    def allows(self, peer: PeerId, *, now: float) -> bool:
        failures = self._failures.get(peer)
        return failures is None or failures.until <= now


class Contacts:
    """The routing table and the back-off, updated by every call in either direction.

    ``on_met`` hears of each node that is new to the table, ``on_doubt`` of nodes that should be pinged
    because others wait for their place. Both are called synchronously and must only take note.
    """

    def __init__(
        self,
        own_id: DhtId,
        own_peer: PeerId,
        *,
        clock: Callable[[], float],
        on_met: Callable[[Contact], None],
        on_doubt: Callable[[Contact], None],
        admits: Callable[[PeerId], bool] = lambda _peer: True,
    ) -> None:
        """``admits`` tells who belongs to the network; others are neither remembered nor asked."""
        self.own_id = own_id
        self.own_peer = own_peer
        self.table = RoutingTable(own_id)
        self._backoff = Backoff()
        self._clock = clock
        self._on_met = on_met
        self._on_doubt = on_doubt
        self._admits = admits

    def answered(self, node_id: DhtId | None, peer: PeerId) -> None:
        """A peer answered us. Without a node id it is a client and is not remembered."""
        self._backoff.succeeded(peer)
        self.heard_from(node_id, peer)

    def heard_from(self, node_id: DhtId | None, peer: PeerId) -> None:
        """A peer asked us something; that does not prove that it can be asked."""
        if node_id is None or node_id == self.own_id or peer == self.own_peer or not self._admits(peer):
            return
        contact = Contact(node_id, peer)
        new = node_id not in self.table
        doubted = self.table.add_or_update(contact, now=self._clock())
        if new:
            log.debug("met node %s at %s", node_id, peer)
            self._on_met(contact)
        if doubted is not None:
            self._on_doubt(doubted)

    def failed(self, peer: PeerId, *, back_off: bool) -> None:
        """A peer gave no answer, or nonsense: forget its node, and with ``back_off`` leave it alone."""
        node_id = self.table.node_of(peer)
        if node_id is not None:
            self.table.remove(node_id)
            log.debug("lost node %s at %s", node_id, peer)
        if back_off:
            self._backoff.failed(peer, now=self._clock())

    def may_ask(self, contact: Contact) -> bool:
        """Whether a search may ask this node: not the own one, and not left alone at the moment."""
        return (
            contact.node_id != self.own_id
            and contact.peer != self.own_peer
            and self._admits(contact.peer)
            and (contact.peer not in self._backoff or self._backoff.allows(contact.peer, now=self._clock()))
        )

    def nearest(self, target: DhtId, count: int, *, exclude: DhtId | None = None) -> list[Contact]:
        return self.table.nearest(target, count, exclude=exclude)
