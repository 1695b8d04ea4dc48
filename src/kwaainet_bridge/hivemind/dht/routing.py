"""The routing table: which peers hold which node ids, denser near the own id. No I/O; time is an argument."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
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
        self._buckets = {_ROOT: _Bucket(_ROOT, size=bucket_size)}  # the leaves of a binary tree, by position
        self._peers: dict[DhtId, PeerId] = {}  # those on reserve lists included
        self._node_ids: dict[PeerId, DhtId] = {}

    def __len__(self) -> int:
        """Nodes that searches may start from; the reserve does not count."""
        return sum(len(bucket.nodes) for bucket in self._buckets.values())

    def __contains__(self, node_id: DhtId) -> bool:
        return node_id in self._peers

    def peer_of(self, node_id: DhtId) -> PeerId | None:
        return self._peers.get(node_id)

    def node_of(self, peer: PeerId) -> DhtId | None:
        return self._node_ids.get(peer)

    def contacts(self) -> list[Contact]:
        return [contact for bucket in self._buckets.values() for contact in bucket.nodes.values()]

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
        for bucket in self._nearest_buckets(target):
            # no two of them are equally far, so that contacts are never compared
            places = [(target ^ c.node_id, c) for c in bucket.nodes.values() if c.node_id != exclude]
            found += [contact for _, contact in sorted(places)]
            if len(found) >= count:
                break
        return found[:count]

    def _nearest_buckets(self, target: DhtId) -> Iterator[_Bucket]:
        """All buckets, nearest first: every node of a nearer one is nearer than those of a farther one."""
        path = _position(target, ID_BITS)
        ahead = [_ROOT]
        while ahead:
            position = ahead.pop()
            bucket = self._buckets.get(position)
            if bucket is not None:
                yield bucket
                continue
            nearer = 2 * position | path >> (ID_BITS - position.bit_length()) & 1
            ahead += [nearer ^ 1, nearer]

    def refresh_ids(self, *, before: float, rng: random.Random) -> list[DhtId]:
        """A random id of each bucket whose nodes were last heard from earlier than ``before``, longest first.

        Searching for it fills the bucket again and drops its dead nodes.
        """
        stale = [bucket for bucket in self._buckets.values() if bucket.heard_at < before]
        return [bucket.random_id(rng) for bucket in sorted(stale, key=lambda bucket: bucket.heard_at)]

    def _bucket(self, node_id: DhtId) -> _Bucket:
        path = _position(node_id, ID_BITS)
        found = (self._buckets.get(path >> depth) for depth in range(ID_BITS, -1, -1))
        return next(bucket for bucket in found if bucket is not None)

    def _split(self, bucket: _Bucket) -> None:
        del self._buckets[bucket.position]
        self._buckets |= {half.position: half for half in bucket.halves()}


_ROOT = 1
"""Positions in the tree of ids are numbered as in a heap: those below ``p`` are ``2 * p`` and ``2 * p + 1``."""


def _position(node_id: DhtId, depth: int) -> int:
    """The position at ``depth`` below which an id lies: a one, and then the first bits of the id."""
    return (1 << ID_BITS | node_id) >> (ID_BITS - depth)


class _Bucket:
    """Up to ``size`` nodes whose ids lie below one position, longest silent first."""

    def __init__(self, position: int, *, size: int, doubted: Iterable[DhtId] = ()) -> None:
        self.position = position
        self.depth = position.bit_length() - 1
        self.size = size
        self.nodes: OrderedDict[DhtId, Contact] = OrderedDict()
        self.reserve: OrderedDict[DhtId, Contact] = OrderedDict()
        self.heard_at = -math.inf
        self._doubted = {node_id for node_id in doubted if self.covers(node_id)}

    def covers(self, node_id: DhtId) -> bool:
        return _position(node_id, self.depth) == self.position

    def random_id(self, rng: random.Random) -> DhtId:
        bits = ID_BITS - self.depth
        return DhtId((self.position << bits | rng.getrandbits(bits)) - (1 << ID_BITS))

    def add_or_update(self, contact: Contact) -> DhtId | None:
        """Make ``contact`` the latest of the nodes, or of the reserve if they are full.

        Returns the node id that fell off the reserve, if any.
        """
        self._doubted.discard(contact.node_id)
        return self.insert(contact)

    def insert(self, contact: Contact) -> DhtId | None:
        """Place a node as ``add_or_update`` does, without taking it for heard from."""
        node_id = contact.node_id
        full = len(self.nodes) >= self.size and node_id not in self.nodes
        rows = self.reserve if full else self.nodes
        rows[node_id] = contact
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
            promoted, contact = self.reserve.popitem(last=True)
            self.nodes[promoted] = contact

    def doubt(self, contact: Contact) -> Contact | None:
        if contact.node_id in self._doubted:
            return None
        self._doubted.add(contact.node_id)
        return contact

    def doubt_longest_silent(self) -> Contact | None:
        for node_id, contact in self.nodes.items():
            if node_id not in self._doubted:
                return self.doubt(contact)
        return None

    def halves(self) -> list[_Bucket]:
        halves = [_Bucket(2 * self.position + bit, size=self.size, doubted=self._doubted) for bit in (0, 1)]
        for half in halves:
            half.heard_at = self.heard_at
        for rows in (self.nodes, self.reserve):
            for node_id, contact in rows.items():
                half = next(half for half in halves if half.covers(node_id))
                half.insert(contact)
        return halves
