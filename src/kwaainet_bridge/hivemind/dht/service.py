"""What this node answers to other nodes of the DHT.

Source of the behaviour: hivemind 1.1.12, ``dht/protocol.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import Refusal, RemoteError
from kwaainet_bridge.hivemind.dht import messages
from kwaainet_bridge.hivemind.dht.authorization import Authorizer, Req, Res
from kwaainet_bridge.hivemind.dht.contacts import Contacts
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import FIND, PING, STORE, StoreItem
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.validation import RecordValidator, valid_part
from kwaainet_bridge.hivemind.dht.values import Record, merge
from kwaainet_bridge.rpc.server import CallContext, RpcServer, UnaryHandler
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

Message = TypeVar("Message")
Value = TypeVar("Value")

_BREATH = 32
"""Items stored, or keys found without a value, between two chances for other tasks to run."""

_ANSWER_RESERVE = 4 * defaults.KIB
"""Part of an answer that is for envelope and headers."""

_NEIGHBOURS_RESERVE = defaults.DHT_BUCKET_SIZE * 100
"""Part of an answer that is for one key's neighbours: ids of 20 and at most 64 bytes, and their headers."""


class DhtService:
    """Handles pings, stores and finds.

    ``call_back`` pings a peer and returns the node id that it gives, None if it cannot be reached. What
    ``validator`` refuses is not kept; whom ``authorizer`` refuses gets an error.
    """

    def __init__(
        self,
        contacts: Contacts,
        *,
        storage: LocalStorage,
        cache: LocalStorage,
        call_back: Callable[[PeerId], Awaitable[DhtId | None]],
        clock: Callable[[], float],
        validator: RecordValidator | None = None,
        authorizer: Authorizer | None = None,
    ) -> None:
        self._contacts = contacts
        self._storage = storage
        self._cache = cache
        self._call_back = call_back
        self._clock = clock
        self.validator = validator
        self._authorizer = authorizer
        self._node = pb.NodeInfo(node_id=contacts.own_id.to_bytes())

    def mount(self, server: RpcServer) -> None:
        """Serve the three methods. ValueError if one is served already."""
        server.mount(PING, self._guarded(self.ping))
        server.mount(STORE, self._guarded(self.store))
        server.mount(FIND, self._guarded(self.find))

    def unmount(self, server: RpcServer) -> None:
        server.unmount(PING)
        server.unmount(STORE)
        server.unmount(FIND)

    def _guarded(self, handler: UnaryHandler[Req, Res]) -> UnaryHandler[Req, Res]:
        """``handler`` for those whom the authorizer lets in."""
        authorizer = self._authorizer
        if authorizer is None:
            return handler

        async def guarded(request: Req, context: CallContext) -> Res:
            if not await authorizer.check_request(request):
                raise Refusal(
                    "not authorized: a valid token, a signature, a synchronous clock and a new nonce are needed",
                    kind="PermissionError",
                )
            response = await handler(request, context)
            await authorizer.sign_response(response, request)
            return response

        return guarded

    async def ping(self, request: pb.PingRequest, context: CallContext) -> pb.PingResponse:
        """Say who and when we are. Asked to validate, first find out whether the caller can be reached."""
        sender = _read(messages.sender, request)
        available = False
        if sender is not None and request.validate:
            available = await self._call_back(context.peer) == sender
        if sender is not None and (available or not request.validate):
            self._contacts.heard_from(sender, context.peer)
        return pb.PingResponse(peer=self._node, dht_time=self._clock(), available=available)

    async def store(self, request: pb.StoreRequest, context: CallContext) -> pb.StoreResponse:
        """Keep what the acceptance rules allow; answer for each item whether it was kept."""
        self._contacts.heard_from(_read(messages.sender, request), context.peer)
        response = pb.StoreResponse(peer=self._node)
        try:
            for i, item in enumerate(messages.read_store_request(request)):
                response.store_ok.append(await self._keep(item, context.peer))
                if i % _BREATH == _BREATH - 1:
                    await trio.lowlevel.checkpoint()
        except RemoteError as e:
            raise Refusal(str(e), kind="ValueError") from e
        log.debug("%s stored %d of %d items here", context.peer, sum(response.store_ok), len(request.keys))
        return response

    async def _keep(self, item: StoreItem, peer: PeerId) -> bool:
        """Keep what is valid of an item; True iff that is all of it and all was accepted."""
        record = messages.read_record(item)
        valid: Record | None = record
        if self.validator is not None:
            valid = await valid_part(self.validator, item.key, record)
            if valid is not record:
                log.debug("%s stored an invalid record under key %s", peer, item.key)
        if valid is None:
            return False
        storage = self._cache if item.in_cache else self._storage
        accepted = storage.store_record(item.key, valid, now=self._clock(), sender=peer)
        return accepted and valid is record

    async def find(self, request: pb.FindRequest, context: CallContext) -> pb.FindResponse:
        """Tell for each key what we hold and which nodes we know near it.

        Values that do not fit the answer any more are left out, as if we had none: a stock caller would get
        no answer at all to a message over the limit, and other replicas hold them too.
        """
        sender = _read(messages.sender, request)
        self._contacts.heard_from(sender, context.peer)
        if len(request.keys) > defaults.DHT_MAX_FIND_KEYS:
            raise Refusal(
                f"{len(request.keys)} keys in one request, the limit is {defaults.DHT_MAX_FIND_KEYS}",
                kind="ValueError",
            )
        if len(set(request.keys)) != len(request.keys):
            raise Refusal("a key is asked for twice in one request", kind="ValueError")
        exclude = sender or DhtId(0)  # stock reads an absent id as 0
        room = defaults.MAX_UNARY_BYTES - _ANSWER_RESERVE - len(request.keys) * _NEIGHBOURS_RESERVE
        response = pb.FindResponse(peer=self._node)
        for i, raw in enumerate(request.keys):
            key = _read(messages.read_key, raw)
            neighbours = self._contacts.nearest(key, defaults.DHT_BUCKET_SIZE, exclude=exclude)
            # a large dictionary takes 10 ms to pack: not for an answer that is full
            result = messages.find_result(self._held(key) if room > 0 else None, neighbours)
            if len(result.value) > room:
                log.debug("the record of key %s does not fit the answer to %s", key, context.peer)
                result = messages.find_result(None, neighbours)
                room = 0
            room -= len(result.value)
            response.results.append(result)
            if result.value or i % _BREATH == _BREATH - 1:
                await trio.lowlevel.checkpoint()
        return response

    def _held(self, key: DhtId) -> Record | None:
        """What we hold for ``key``, stored and cached.

        Stock answers with the one of the two that expires later, by which anybody can hide a stored dictionary
        behind a cached one.
        """
        now = self._clock()
        stored = self._storage.get(key, now=now)
        cached = self._cache.get(key, now=now)
        return stored if cached is None else merge(stored, cached)


def _read(reader: Callable[[Message], Value], message: Message) -> Value:
    """Read a part of a request; what cannot be read is answered to the caller as an error."""
    try:
        return reader(message)
    except RemoteError as e:
        raise Refusal(str(e), kind="ValueError") from e
