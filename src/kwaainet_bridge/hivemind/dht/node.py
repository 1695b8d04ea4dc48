"""A node of the Hivemind DHT: joins through known peers, keeps a share of the records, stores and reads.

Source of the behaviour: hivemind 1.1.12, ``dht/node.py``.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import BridgeError, NetworkError, RemoteError
from kwaainet_bridge.hivemind.dht.authorization import Authorizer
from kwaainet_bridge.hivemind.dht.client import DhtClient, Pong
from kwaainet_bridge.hivemind.dht.contacts import Contacts
from kwaainet_bridge.hivemind.dht.hand_over import HandOver
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import StoreItem, read_record
from kwaainet_bridge.hivemind.dht.placement import Placement, StoreResult, place
from kwaainet_bridge.hivemind.dht.reading import Reader, TakeIn
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.search import Step, search
from kwaainet_bridge.hivemind.dht.service import DhtService
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.validation import CompositeValidator, RecordValidator, stripped
from kwaainet_bridge.hivemind.dht.values import Found, Record, decode
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_PENDING_CHORES = 64
_CHORE_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Item:
    """Something to store: ``value`` under ``key``, or under ``subkey`` of the dictionary at ``key``.

    Key, subkey and value are anything that msgpack carries; ``expiration`` is in unix seconds.
    """

    key: Any
    value: Any
    expiration: float
    subkey: Hashable = None


@dataclass(frozen=True, slots=True)
class BootstrapResult:
    """How one bootstrap peer answered: the round trip in seconds, or the error."""

    peer: PeerId
    seconds: float | None
    error: BridgeError | None

    @property
    def ok(self) -> bool:
        return self.error is None


class DhtNode:
    """One node, over a host that finds peers by id.

    In ``client_mode`` it serves nothing, keeps nothing for others and is in nobody's table. ``clock`` tells
    unix time; records expire by it and must agree with that of other nodes to within 3 s. ``validator`` checks
    what others store and answer, and signs what is stored from here; all nodes of a network should have the
    same. With ``authorizer`` only peers that it lets in are answered and believed. Peers that ``admits`` denies are
    answered, as clients are, but belong to another network: they are not asked, and nothing is stored with them.

    Calls may be made from any task while ``running()`` is entered, any number at a time.
    """

    def __init__(
        self,
        host: Host,
        server: RpcServer,
        client: RpcClient,
        *,
        client_mode: bool = False,
        replicas: int = defaults.DHT_REPLICAS,
        storage_bytes: int = defaults.DHT_STORAGE_BYTES,
        cache_bytes: int = defaults.DHT_CACHE_BYTES,
        validator: RecordValidator | None = None,
        authorizer: Authorizer | None = None,
        admits: Callable[[PeerId], bool] = lambda _peer: True,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.SystemRandom()
        self.node_id = DhtId.random(self._rng)
        self.peer_id = host.peer_id
        self.client_mode = client_mode
        self._server = server
        self._replicas = replicas
        self._clock = clock
        self._validator = validator
        self._nursery: trio.Nursery | None = None
        self._storage = LocalStorage(max_bytes=storage_bytes)
        self._cache = LocalStorage(max_bytes=cache_bytes, evict=True)
        self._chores, self._todo = trio.open_memory_channel[Callable[[], Awaitable[object]]](_PENDING_CHORES)
        self._contacts = Contacts(
            self.node_id,
            host.peer_id,
            clock=trio.current_time,
            on_met=lambda contact: self._later(partial(self._hand_over.to, contact)),
            on_doubt=lambda contact: self._later(partial(self._check_alive, contact)),
            admits=admits,
        )
        self._remote = DhtClient(
            client,
            self._contacts,
            client_mode=client_mode,
            clock=clock,
            validator=validator,
            authorizer=authorizer,
        )
        self._hand_over = HandOver(
            self._storage, self._contacts, self._remote, replicas=replicas, clock=clock
        )
        self._reader = Reader(
            self._storage,
            self._cache,
            self._search,
            pass_on=lambda contact, key, record: self._later(partial(self._cache_at, contact, key, record)),
            clock=clock,
        )
        self._service = DhtService(
            self._contacts,
            storage=self._storage,
            cache=self._cache,
            call_back=self._remote.call_back,
            clock=clock,
            validator=validator,
            authorizer=authorizer,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[DhtNode]:
        """Serve the DHT's methods and do background chores within the block. To be entered once.

        Leaving it stops serving and cancels the chores; records are lost with the node, and searches of other
        tasks end with NetworkError.
        """
        if not self.client_mode:
            self._service.mount(self._server)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for _ in range(_CHORE_WORKERS):
                    nursery.start_soon(self._do_chores)
                nursery.start_soon(self._reader.keep_fresh)
                nursery.start_soon(self._refresh_buckets)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            if not self.client_mode:
                self._service.unmount(self._server)

    def set_mode(self, *, client_mode: bool) -> None:
        """Go on as a client, which nobody calls, or as a server again. To be called while it is running.

        Others drop a server that has become a client when a call to it fails; records that it keeps stay with it. A
        server is met again by whom it calls.
        """
        if client_mode is self.client_mode:
            return
        self.client_mode = client_mode
        self._remote.set_mode(client_mode=client_mode)
        if client_mode:
            self._service.unmount(self._server)
        else:
            self._service.mount(self._server)
            self._later(partial(self._find_nearest, [self.node_id]))

    def add_validators(self, validators: Sequence[RecordValidator]) -> None:
        """Check, sign and strip records by these too from now on, beside what there is already.

        What this node holds already is not checked again: it was accepted under the old rules.
        """
        combined = CompositeValidator([*([] if self._validator is None else [self._validator]), *validators])
        self._validator = self._remote.validator = self._service.validator = combined

    def neighbours(self) -> list[Contact]:
        """The nodes in the routing table. If there are none, only bootstrap() leads back to the network."""
        return self._contacts.table.contacts()

    # --- joining ------------------------------------------------------------------------------------------

    async def ping(self, peer: PeerId) -> float:
        """Round-trip time to a peer's DHT in seconds. Raises NetworkError or RemoteError."""
        return (await self._remote.ping(peer)).seconds

    async def check(self, peer: PeerId) -> Pong:
        """Compare clocks with a peer and, unless in client mode, have it call us back.

        Raises ClockSkew, CallBackFailed, or another NetworkError or RemoteError.
        """
        return await self._remote.ping(peer, validate=True)

    async def bootstrap(self, peers: Sequence[PeerId]) -> list[BootstrapResult]:
        """Join the network that ``peers`` belong to; may be repeated. Raises nothing for peers that fail.

        Each peer is asked to call back, and its clock is compared with ours; an error of ClockSkew or
        CallBackFailed in its result names the trouble. Then the neighbourhood of the own id is searched,
        which makes this node known there.
        """
        results: dict[PeerId, BootstrapResult] = {}

        async def join(peer: PeerId) -> None:
            try:
                pong = await self.check(peer)
            except (NetworkError, RemoteError) as e:
                log.info("DHT bootstrap peer %s: %s", peer, e)
                results[peer] = BootstrapResult(peer, None, e)
            else:
                results[peer] = BootstrapResult(peer, pong.seconds, None)

        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys(peers):
                nursery.start_soon(join, peer)
        await self._find_nearest([self.node_id])
        log.info(
            "DHT: %d of %d bootstrap peers answered, %d nodes known",
            sum(result.ok for result in results.values()),
            len(results),
            len(self._contacts.table),
        )
        return [results[peer] for peer in peers]

    # --- storing ------------------------------------------------------------------------------------------

    async def store(self, key: Any, value: Any, expiration: float, *, subkey: Hashable = None) -> StoreResult:
        """Store one value; see store_many."""
        return (await self.store_many([Item(key, value, expiration, subkey)]))[0]

    async def store_many(self, items: Sequence[Item]) -> list[StoreResult]:
        """Store each item at the nodes nearest to its key, this one included; say for each who accepted it.

        Goes on to farther nodes for those that fail to answer. Raises TypeError or ValueError for keys and
        values that msgpack cannot carry, a time that is no number, a value over
        ``defaults.DHT_MAX_RECORD_BYTES`` or one that the validator refuses; nothing for peers that fail.
        Cancelled: some nodes may hold some of the items.
        """
        placements = [Placement(self._wire_item(item)) for item in items]
        by_key: dict[DhtId, list[Placement]] = {}
        for placement in placements:
            by_key.setdefault(placement.item.key, []).append(placement)
        nearest = await self._find_nearest(by_key)
        own = [] if self.client_mode else [Contact(self.node_id, self.peer_id)]
        for key, group in by_key.items():
            candidates = sorted(nearest[key] + own, key=lambda contact: contact.node_id.distance(key))
            for placement in group:
                placement.candidates.extend(candidates)
        await place(placements, self._offer, replicas=self._replicas)
        results = [placement.result() for placement in placements]
        for item, placement, result in zip(items, placements, results, strict=True):
            log.debug("stored key %.80r subkey %.80r: %s", item.key, item.subkey, result)
            self._reader.stored(placement.item.key, read_record(placement.item), accepted=result.ok)
        return results

    async def store_at(self, peers: Sequence[PeerId], items: Sequence[Item]) -> list[StoreResult]:
        """Store each item at all of these peers and nowhere else: a network whose nodes do not pass records on.

        Raises and is cancelled as store_many.
        """
        wire_items = [self._wire_item(item) for item in items]
        answers: dict[PeerId, list[bool] | str] = {}

        async def offer(peer: PeerId) -> None:
            try:
                answers[peer] = await self._remote.store(peer, wire_items)
            except (NetworkError, RemoteError) as e:
                answers[peer] = str(e)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(offer, peer)
        kept = {peer: answer for peer, answer in answers.items() if isinstance(answer, list)}
        failed = {peer: answer for peer, answer in answers.items() if isinstance(answer, str)}
        return [
            StoreResult(
                tuple(peer for peer, accepted in kept.items() if accepted[number]),
                tuple(peer for peer, accepted in kept.items() if not accepted[number]),
                failed,
            )
            for number in range(len(wire_items))
        ]

    def _wire_item(self, item: Item) -> StoreItem:
        if math.isnan(item.expiration):
            raise ValueError(f"DHT key {item.key!r:.80}: the expiration is no number")
        value = pack(item.value)
        if len(value) > defaults.DHT_MAX_RECORD_BYTES:
            raise ValueError(
                f"DHT key {item.key!r:.80}: {len(value)} bytes of value exceed {defaults.DHT_MAX_RECORD_BYTES}"
            )
        wire_item = StoreItem.of(DhtId.of(item.key), item.subkey, value, float(item.expiration))
        if self._validator is not None:
            wire_item = replace(wire_item, value=self._validator.sign_value(wire_item.as_record()))
            if not self._validator.validate(wire_item.as_record()):
                raise ValueError(
                    f"DHT key {item.key!r:.80}: this node's own record validator refuses the record"
                )
        try:
            read_record(wire_item)
        except RemoteError as e:
            raise ValueError(f"DHT key {item.key!r:.80}: {e}") from e
        return wire_item

    async def _offer(self, contact: Contact, items: Sequence[StoreItem]) -> list[bool]:
        """Offer items to one node, which may be this one."""
        if contact.node_id != self.node_id:
            return await self._remote.store(contact.peer, items)
        now = self._clock()
        return [self._storage.store_record(item.key, read_record(item), now=now) for item in items]

    # --- reading ------------------------------------------------------------------------------------------

    async def get(self, key: Any, *, latest: bool = True) -> Found | None:
        """Read one key; see get_many."""
        key_id = DhtId.of(key)
        records = await self._reader.read([key_id], latest=latest)
        return self._decode(key, key_id, records[key_id]) if key_id in records else None

    async def get_many(
        self, keys: Collection[Hashable], *, latest: bool = True
    ) -> dict[Hashable, Found | None]:
        """Read keys: with ``latest`` ask all near nodes and merge what they hold, else take the first find.

        Calls for the same key at the same time share one search. Values whose msgpack cannot be read are left
        out. Raises TypeError or ValueError for keys that msgpack cannot carry; nothing for peers that fail.
        Cancelled: nothing remains.
        """
        ids = {key: DhtId.of(key) for key in keys}
        records = await self._reader.read(ids.values(), latest=latest)
        return {
            key: self._decode(key, key_id, records[key_id]) if key_id in records else None
            for key, key_id in ids.items()
        }

    def _decode(self, key: Any, key_id: DhtId, record: Record) -> Found | None:
        if self._validator is not None:
            record = stripped(self._validator, key_id, record)
        return decode(record, key=key)

    # --- searching ----------------------------------------------------------------------------------------

    async def _find_nearest(
        self, targets: Iterable[DhtId], *, width: int = defaults.DHT_BUCKET_SIZE
    ) -> dict[DhtId, list[Contact]]:
        """The up to ``width`` live nodes nearest to each target, without this one."""
        return await self._search(targets, lambda _contact, _target, _answer: False, width=width)

    async def _search(
        self, targets: Iterable[DhtId], take_in: TakeIn, *, width: int = defaults.DHT_BUCKET_SIZE
    ) -> dict[DhtId, list[Contact]]:
        """Search for targets; ``take_in`` sees every answer and says whether its target is done."""

        searching = True
        true_ids: dict[PeerId, DhtId | None] = {}  # of the peers asked: others may name them under any id

        async def ask(contact: Contact, keys: Sequence[DhtId]) -> dict[DhtId, Step] | None:
            if not self._contacts.may_ask(contact):
                return None
            if true_ids.get(contact.peer, contact.node_id) != contact.node_id:
                return None
            try:
                answers = await self._remote.find(contact, keys)
            except (NetworkError, RemoteError) as e:
                log.debug("search: %s", e)
                true_ids[contact.peer] = self._contacts.table.node_of(contact.peer)
                return None
            if not searching:
                return None  # it is too late to take it in
            return {
                key: Step(answer.neighbours, finished=take_in(contact, key, answer))
                for key, answer in answers.items()
            }

        targets = list(targets)
        seeds = {
            contact.node_id: contact
            for target in targets
            for contact in self._contacts.nearest(target, width)
        }
        assert self._nursery is not None, "the node is not running"
        try:
            return await search(
                targets,
                seeds.values(),
                ask,
                background=self._nursery,
                width=width,
                may_ask=self._contacts.may_ask,
            )
        finally:
            searching = False

    # --- chores -------------------------------------------------------------------------------------------

    def _later(self, chore: Callable[[], Awaitable[object]]) -> None:
        """Have something done in the background. With too much to do already, it is not done at all."""
        try:
            self._chores.send_nowait(chore)
        except trio.WouldBlock:
            log.debug("DHT: too many chores, one is left out")

    async def _do_chores(self) -> None:
        async for chore in self._todo:
            try:
                await chore()
            except (NetworkError, RemoteError) as e:
                log.debug("DHT chore: %s", e)

    async def _refresh_buckets(self) -> None:
        """Search where the table has heard of nobody for long, so that dead nodes leave it and new ones enter.

        Source: Kademlia, section 2.3. Stock has it too (``refresh_timeout``), switched off.
        """
        while True:
            await trio.sleep(defaults.DHT_BUCKET_REFRESH_SECONDS)
            if not len(self._contacts.table):
                continue  # only bootstrap() leads back
            before = trio.current_time() - defaults.DHT_BUCKET_REFRESH_SECONDS
            stale = self._contacts.table.refresh_ids(before=before, rng=self._rng)
            if targets := stale[: defaults.DHT_KEYS_PER_QUERY]:
                share = defaults.DHT_BUCKET_REFRESH_NODES // len(targets)
                width = max(defaults.DHT_REPLICAS, min(share, defaults.DHT_BUCKET_SIZE))
                await self._find_nearest(targets, width=width)

    async def _check_alive(self, contact: Contact) -> None:
        """Ping a node for whose place another waits; if it fails, the call removes it."""
        await self._remote.ping(contact.peer)

    async def _cache_at(self, contact: Contact, key: DhtId, record: Record) -> None:
        """Give a record to a node that is nearest to its key and lacks it, so that the next reader meets it."""
        item = StoreItem.of_record(key, record, in_cache=True)
        if item.wire_bytes <= defaults.DHT_STORE_REQUEST_BYTES:
            await self._remote.store(contact.peer, [item])
