"""Calling other nodes of the DHT. Every answer and every failure updates the contacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CallBackFailed, ClockSkew, NetworkError, RemoteError
from kwaainet_bridge.hivemind.dht import messages
from kwaainet_bridge.hivemind.dht.authorization import Authorizer, Req, Res
from kwaainet_bridge.hivemind.dht.contacts import Contacts
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import FIND, PING, STORE, FindAnswer, StoreItem
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.validation import RecordValidator, valid_part
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.method import UnaryMethod
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a ping: the peer's node id (None from clients) and the round trip in seconds.

    ``ahead`` is how many seconds the peer's clock is ahead of ours, to within half a round trip; None if it told
    no time.
    """

    node_id: DhtId | None
    seconds: float
    ahead: float | None


class DhtClient:
    """The calls of one node. In ``client_mode`` it gives no node id, so that nobody calls it.

    All methods raise NetworkError or RemoteError for a peer that fails; it is then removed from the routing
    table. Cancelled: the call is abandoned and the contacts are not changed.
    """

    def __init__(
        self,
        rpc: RpcClient,
        contacts: Contacts,
        *,
        client_mode: bool,
        clock: Callable[[], float],
        validator: RecordValidator | None = None,
        authorizer: Authorizer | None = None,
        timeout: float = defaults.DHT_CALL_SECONDS,
        parallel: int = defaults.DHT_PARALLEL_CALLS,
    ) -> None:
        self._rpc = rpc
        self._contacts = contacts
        self._clock = clock
        self.validator = validator
        self._authorizer = authorizer
        self._timeout = timeout
        self._slots = trio.CapacityLimiter(parallel)
        self._called_back: set[PeerId] = set()
        self.set_mode(client_mode=client_mode)

    def set_mode(self, *, client_mode: bool) -> None:
        """Give no node id from now on, or give it again."""
        self._client_mode = client_mode
        self._node = pb.NodeInfo() if client_mode else pb.NodeInfo(node_id=self._contacts.own_id.to_bytes())

    async def ping(self, peer: PeerId, *, validate: bool = False) -> Pong:
        """Ask who a peer is. With ``validate`` also compare clocks and have the peer call us back.

        Raises ClockSkew, and the peer is then left alone; or CallBackFailed (never in client mode), and it is
        used nevertheless. Source of both checks: hivemind 1.1.12, ``dht/protocol.py``.
        """
        async with self._slots:
            return await self._ping(peer, validate=validate, timeout=self._timeout)

    async def call_back(self, peer: PeerId) -> DhtId | None:
        """The node id of a peer that asked whether it can be reached; None if it cannot.

        Also None if the same peer, or too many others, are being called back already: nobody may keep this node
        from its own calls by asking.
        """
        if peer in self._called_back or len(self._called_back) >= defaults.DHT_CALL_BACKS:
            return None
        self._called_back.add(peer)
        try:
            return (await self._ping(peer, validate=False, timeout=defaults.DHT_CALL_BACK_SECONDS)).node_id
        except (NetworkError, RemoteError):
            return None
        finally:
            self._called_back.discard(peer)

    async def _ping(self, peer: PeerId, *, validate: bool, timeout: float) -> Pong:
        request = pb.PingRequest(peer=self._node, validate=validate)
        sent, started = self._clock(), trio.current_time()
        response = await self._call(peer, PING, request, timeout=timeout)
        received, seconds = self._clock(), trio.current_time() - started
        if validate:
            try:
                _check_clock(peer, response.dht_time, sent, received)
            except ClockSkew:
                # its call-back has introduced it meanwhile
                self._contacts.failed(peer, back_off=True)
                raise
        told = response.dht_time
        ahead = told - (sent + received) / 2 if told else None
        pong = Pong(self._answered(peer, response), seconds, ahead)
        if validate and not self._client_mode and not response.available:
            raise CallBackFailed(
                f"{peer} answers but could not call us back: check that our announced addresses work"
            )
        return pong

    async def store(self, peer: PeerId, items: Sequence[StoreItem]) -> list[bool]:
        """Ask a peer to keep items, in as many requests as they need; returns which it accepted.

        If a later request fails, the peer may hold the items of the earlier ones.
        """
        accepted: list[bool] = []
        for batch in _batches(items):
            async with self._slots:
                request = messages.store_request(batch, self._node)
                response = await self._call(peer, STORE, request, timeout=self._timeout)
            if len(response.store_ok) != len(batch):
                raise self._wrong(peer, f"store_ok: {len(response.store_ok)} answers for {len(batch)} items")
            self._answered(peer, response)
            accepted += response.store_ok
        return accepted

    async def find(self, contact: Contact, keys: Sequence[DhtId]) -> dict[DhtId, FindAnswer]:
        """Ask a node what it holds for some keys and whom it knows near them. Failure leads to a back-off.

        Raises RemoteError also if the peer is alive but no longer, or never was, the node it was taken for.
        """
        peer = contact.peer
        request = messages.find_request(keys, self._node)
        async with self._slots:
            response = await self._call(peer, FIND, request, timeout=self._timeout, back_off=True)
        try:
            answers = messages.read_find_response(response, keys, now=self._clock())
        except RemoteError as e:
            raise self._wrong(peer, str(e), back_off=True) from e
        node_id = self._answered(peer, response)
        if node_id != contact.node_id:
            raise RemoteError(f"DHT node at {peer}: it is node {node_id}, not {contact.node_id}")
        return {key: await self._validated(key, answer) for key, answer in answers.items()}

    async def _validated(self, key: DhtId, answer: FindAnswer) -> FindAnswer:
        """An answer without what the validator refuses: its sender may only have passed it on."""
        if self.validator is None or answer.record is None:
            return answer
        return replace(answer, record=await valid_part(self.validator, key, answer.record))

    async def _call(
        self,
        peer: PeerId,
        method: UnaryMethod[Req, Res],
        request: Req,
        *,
        timeout: float,
        back_off: bool = False,
    ) -> Res:
        authorizer = self._authorizer
        if authorizer is not None:
            await authorizer.sign_request(request)
        try:
            response = await self._rpc.call(peer, method, request, timeout=timeout)
        except (NetworkError, RemoteError):
            self._contacts.failed(peer, back_off=back_off)
            raise
        if authorizer is not None and not await authorizer.check_response(response, request):
            raise self._wrong(peer, "its answer is not authorized: it is no member here", back_off=back_off)
        return response

    def _answered(
        self, peer: PeerId, response: pb.PingResponse | pb.StoreResponse | pb.FindResponse
    ) -> DhtId | None:
        try:
            node_id = messages.responder(response)
        except RemoteError as e:
            raise self._wrong(peer, str(e)) from e
        self._contacts.answered(node_id, peer)
        return node_id

    def _wrong(self, peer: PeerId, what: str, *, back_off: bool = False) -> RemoteError:
        self._contacts.failed(peer, back_off=back_off)
        return RemoteError(f"DHT node at {peer}: {what}")


def _check_clock(peer: PeerId, theirs: float, sent: float, received: float) -> None:
    """Raise ClockSkew unless ``theirs`` lies between the others or near; 0 means that the peer told none."""
    if theirs == 0.0:
        return
    limit = defaults.DHT_CLOCK_SKEW_SECONDS
    if not sent - limit <= theirs <= received + limit:
        seconds = theirs - received if theirs > received else theirs - sent
        raise ClockSkew(
            f"the clock of {peer} is {seconds:+.1f} s from ours, the limit is {limit:g} s: set both by NTP",
            seconds=seconds,
        )


def _batches(items: Iterable[StoreItem]) -> Iterator[list[StoreItem]]:
    """Cut items into requests of bounded size and number."""
    batch: list[StoreItem] = []
    room = defaults.DHT_STORE_REQUEST_BYTES
    for item in items:
        if batch and (item.wire_bytes > room or len(batch) == defaults.DHT_MAX_STORE_ITEMS):
            yield batch
            batch, room = [], defaults.DHT_STORE_REQUEST_BYTES
        batch.append(item)
        room -= item.wire_bytes
    if batch:
        yield batch
