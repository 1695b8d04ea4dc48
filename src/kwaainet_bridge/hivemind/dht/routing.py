"""The routing table: which peers hold which node ids, denser near the own id. No I/O; time is an argument."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import ID_BITS, DhtId
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Contact:
    """A node of the DHT and the peer that runs it."""

    node_id: DhtId
    peer: PeerId


class RoutingTable:
    """Kademlia's k-buckets over ranges of node ids.

    A full bucket is split if it covers the own id or its depth is not a multiple of ``depth_modulo``;
    otherwise newcomers wait on the bucket's reserve list until one of its nodes fails.
    Source: hivemind 1.1.12, ``dht/routing.py``. Stricter than stock: a peer has one node id at a time, a node
    id that a live peer holds is not given to another, and reserve lists are bounded.
    """

    def __init__(
        self,
        own_id: DhtId,
        *,
        bucket_size: int = defaults.DHT_BUCKET_SIZE,
        depth_modulo: int = defaults.DHT_DEPTH_MODULO,
    ) -> None:
        self.own_id = own_id
        self.bucket_size = bucket_size
        self.depth_modulo = depth_modulo
        self._buckets = [_Bucket(prefix=0, depth=0, size=bucket_size)]
        self._peers: dict[DhtId, PeerId] = {}  # those on reserve lists included
        self._node_ids: dict[PeerId, DhtId] = {}

    def __len__(self) -> int:
        """Nodes that searches may start from; the reserve does not count."""
        return sum(len(bucket.nodes) for bucket in self._buckets)

    def __contains__(self, node_id: DhtId) -> bool:
        return node_id in self._peers

    def peer_of(self, node_id: DhtId) -> PeerId | None:
        return self._peers.get(node_id)

    def node_of(self, peer: PeerId) -> DhtId | None:
        return self._node_ids.get(peer)

    def contacts(self) -> list[Contact]:
        return [Contact(n, p) for bucket in self._buckets for n, p in bucket.nodes.items()]

    def add_or_update(self, contact: Contact, *, now: float) -> Contact | None:
        """Note that ``contact`` was heard from ``now``, in seconds of any clock.

        Returns a contact that should be pinged because the newcomer depends on its answer (the one that was
        silent longest in a full bucket, or the holder of the same node id), or None. A contact is returned
        only once until it is heard from again or removed.
        """
        if contact.node_id == self.own_id:
            return None
        held_by = self._peers.get(contact.node_id)
        if held_by is not None and held_by != contact.peer:
            return self._bucket(contact.node_id).doubt(Contact(contact.node_id, held_by))
        former_id = self._node_ids.get(contact.peer)
        if former_id is not None and former_id != contact.node_id:
            self.remove(former_id)
        return self._insert(contact, now)

    def _insert(self, contact: Contact, now: float) -> Contact | None:
        while True:
            bucket = self._bucket(contact.node_id)
            bucket.heard_at = now
            forgotten = bucket.add_or_update(contact)
            if forgotten is not None:
                self._forget(forgotten)
            self._peers[contact.node_id] = contact.peer
            self._node_ids[contact.peer] = contact.node_id
            if contact.node_id in bucket.nodes:
                return None
            if not bucket.covers(self.own_id) and bucket.depth % self.depth_modulo == 0:
                return bucket.doubt_longest_silent()
            self._split(bucket)

    def remove(self, node_id: DhtId) -> None:
        """Forget a node; the latest of its bucket's reserve takes its place. Unknown ids are no error."""
        if node_id in self._peers:
            self._bucket(node_id).remove(node_id)
            self._forget(node_id)

    def _forget(self, node_id: DhtId) -> None:
        del self._node_ids[self._peers.pop(node_id)]

    def nearest(self, target: DhtId, count: int, *, exclude: DhtId | None = None) -> list[Contact]:
        """The up to ``count`` nodes nearest to ``target``, nearest first, without ``exclude``."""
        found: list[Contact] = []
        # buckets are disjoint subtrees: all nodes of a nearer bucket are nearer than those of a farther one
        for bucket in sorted(self._buckets, key=lambda bucket: bucket.distance(target)):
            node_ids = sorted(bucket.nodes.keys() - {exclude}, key=target.distance)
            found += [Contact(node_id, bucket.nodes[node_id]) for node_id in node_ids]
            if len(found) >= count:
                break
        return found[:count]

    def refresh_ids(self, *, before: float, rng: random.Random) -> list[DhtId]:
        """A random id of each bucket whose nodes were last heard from earlier than ``before``, longest first.

        Searching for it fills the bucket again and drops its dead nodes.
        """
        stale = [bucket for bucket in self._buckets if bucket.heard_at < before]
        return [bucket.random_id(rng) for bucket in sorted(stale, key=lambda bucket: bucket.heard_at)]

    def _bucket(self, node_id: DhtId) -> _Bucket:
        return next(bucket for bucket in self._buckets if bucket.covers(node_id))

    def _split(self, bucket: _Bucket) -> None:
        at = self._buckets.index(bucket)
        self._buckets[at : at + 1] = bucket.halves()


class _Bucket:
    """Up to ``size`` nodes whose ids begin with the ``depth`` bits of ``prefix``, longest silent first."""

    def __init__(self, *, prefix: int, depth: int, size: int, doubted: Iterable[DhtId] = ()) -> None:
        self.prefix = prefix
        self.depth = depth
        self.size = size
        self.nodes: OrderedDict[DhtId, PeerId] = OrderedDict()
        self.reserve: OrderedDict[DhtId, PeerId] = OrderedDict()
        self.heard_at = -math.inf
        self._doubted = {node_id for node_id in doubted if self.covers(node_id)}

    def covers(self, node_id: DhtId) -> bool:
        return node_id.number >> (ID_BITS - self.depth) == self.prefix

    def random_id(self, rng: random.Random) -> DhtId:
        bits = ID_BITS - self.depth
        return DhtId(self.prefix << bits | rng.getrandbits(bits))

    def distance(self, target: DhtId) -> int:
        """Distance of ``target`` to the nearest id that this bucket could hold."""
        shift = ID_BITS - self.depth
        return ((target.number >> shift) ^ self.prefix) << shift

    def add_or_update(self, contact: Contact) -> DhtId | None:
        """Make ``contact`` the latest of the nodes, or of the reserve if they are full.

        Returns the node id that fell off the reserve, if any.
        """
        self._doubted.discard(contact.node_id)
        return self.insert(contact.node_id, contact.peer)

    def insert(self, node_id: DhtId, peer: PeerId) -> DhtId | None:
        """Place a node as ``add_or_update`` does, without taking it for heard from."""
        full = len(self.nodes) >= self.size and node_id not in self.nodes
        rows = self.reserve if full else self.nodes
        rows[node_id] = peer
        rows.move_to_end(node_id)
        if not full:
            self.reserve.pop(node_id, None)
        if len(self.reserve) > self.size:
            return self.reserve.popitem(last=False)[0]
        return None

    def remove(self, node_id: DhtId) -> None:
        self._doubted.discard(node_id)
        self.reserve.pop(node_id, None)
        if self.nodes.pop(node_id, None) is not None and self.reserve:
            promoted, peer = self.reserve.popitem(last=True)
            self.nodes[promoted] = peer

    def doubt(self, contact: Contact) -> Contact | None:
        if contact.node_id in self._doubted:
            return None
        self._doubted.add(contact.node_id)
        return contact

    def doubt_longest_silent(self) -> Contact | None:
        for node_id, peer in self.nodes.items():
            if node_id not in self._doubted:
                return self.doubt(Contact(node_id, peer))
        return None

    def halves(self) -> list[_Bucket]:
        halves = [
            _Bucket(prefix=2 * self.prefix + bit, depth=self.depth + 1, size=self.size, doubted=self._doubted)
            for bit in (0, 1)
        ]
        for half in halves:
            half.heard_at = self.heard_at
        for rows in (self.nodes, self.reserve):
            for node_id, peer in rows.items():
                half = next(half for half in halves if half.covers(node_id))
                half.insert(node_id, peer)
        return halves
