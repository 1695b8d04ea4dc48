"""Being a relay: places for peers that cannot be dialled, and the circuits to them.

Source: libp2p specification ``relay/circuit-v2.md``; the limits are those of a stock Hivemind daemon that knows itself
public (``d/relay.go``).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address, public_first
from kwaainet_bridge.net.circuit import read_message
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import (
    STOP,
    CircuitLimit,
    HopMessage,
    HopType,
    Status,
    StopMessage,
    StopType,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
    status_name,
)
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_TAG = "relayed"
_COPY_BYTES = 64 * 1024


class RelayingHost(Protocol):
    """What is asked of the host."""

    peer_id: PeerId

    async def open_direct_stream(
        self, peer: PeerId, addresses: Sequence[Address], protocol: str
    ) -> YamuxStream:
        """Open a stream without a relay or a lookup."""

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""

    def relay_of(self, stream: YamuxStream) -> PeerId | None:
        """Who carries the connection of ``stream``."""

    def origin_of(self, stream: YamuxStream) -> str | None:
        """Who answers for the address that the peer of ``stream`` is seen at; None if that is not public."""

    def direct_addresses(self) -> Sequence[Address]:
        """Where this host is dialled."""

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer``."""

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo :meth:`protect`."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Places at one time, of all and of peers at one public address; circuits at one time, of all and of each peer;
    what one circuit carries."""

    reservations: int = defaults.RELAY_RESERVATIONS
    reservations_per_address: int = defaults.RELAY_RESERVATIONS_PER_ADDRESS
    circuits: int = defaults.RELAY_CIRCUITS
    circuits_per_peer: int = defaults.RELAY_CIRCUITS_PER_PEER
    circuit: CircuitLimit = field(
        default=CircuitLimit(defaults.RELAY_CIRCUIT_SECONDS, defaults.RELAY_CIRCUIT_BYTES)
    )


class RelayService:
    """Serves HOP. A place is given up with the connection of its peer, or when it is not renewed for an hour.

    ``nursery`` runs what watches over places. ``clock`` tells unix time.
    """

    def __init__(
        self,
        host: RelayingHost,
        nursery: trio.Nursery,
        limits: RelayLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._nursery = nursery
        self._limits = limits
        self._clock = clock
        self._places: dict[PeerId, trio.CancelScope] = {}
        self._origins: dict[PeerId, str | None] = {}  # of those that have a place
        self._circuits: Counter[PeerId] = Counter()

    @property
    def reservations(self) -> list[PeerId]:
        """Peers that have a place."""
        return list(self._places)

    @property
    def circuits(self) -> int:
        """Circuits at this time."""
        return self._circuits.total() // 2

    async def serve(self, stream: YamuxStream) -> None:
        """Serve one stream of HOP; for a circuit until that has ended.

        Raises RemoteError or a NetworkError for a bad beginning. Cancelled: the circuit is cut.
        """
        try:
            request = decode_hop(await read_message(stream))
        except RemoteError:
            await self._answer(stream, Status.MALFORMED_MESSAGE)
            return
        if self._host.relay_of(stream) is not None:
            await self._answer(stream, Status.PERMISSION_DENIED)  # no relay of relays
        elif request.type == HopType.RESERVE:
            await self._reserve(stream)
        elif request.type != HopType.CONNECT or request.peer is None:
            await self._answer(stream, Status.MALFORMED_MESSAGE)
        else:
            await self._connect(stream, request.peer)

    @staticmethod
    async def _answer(
        stream: YamuxStream,
        status: Status,
        *,
        expires: int | None = None,
        addresses: tuple[bytes, ...] = (),
        limit: CircuitLimit | None = None,
    ) -> None:
        answer = HopMessage(HopType.STATUS, status=status, expires=expires, addresses=addresses, limit=limit)
        await stream.write(encode_hop(answer))

    # --- places

    async def _reserve(self, stream: YamuxStream) -> None:
        peer = stream.remote
        known = self._places.get(peer)
        origin = self._host.origin_of(stream)
        if known is None and not self._has_room_for(origin):
            await self._answer(stream, Status.RESERVATION_REFUSED)
            return
        ends = trio.current_time() + defaults.RELAY_RESERVATION_SECONDS
        if known is None:
            self._places[peer] = trio.CancelScope(deadline=ends)
            self._origins[peer] = origin
            self._nursery.start_soon(self._keep_place, peer)
            log.debug("%s has a place here", peer)
        else:
            known.deadline = ends
        own = public_first(self._host.direct_addresses())[: defaults.MAX_RELAY_ADDRESSES]
        await self._answer(
            stream,
            Status.OK,
            expires=int(self._clock() + defaults.RELAY_RESERVATION_SECONDS),
            addresses=tuple(address.binary_of(self._host.peer_id) for address in own),
            limit=self._limits.circuit,
        )

    def _has_room_for(self, origin: str | None) -> bool:
        if len(self._places) >= self._limits.reservations:
            return False
        # identities cost nothing, and the connections of those that have places are kept
        there = sum(other == origin for other in self._origins.values())
        return origin is None or there < self._limits.reservations_per_address

    async def _keep_place(self, peer: PeerId) -> None:
        self._host.protect(peer, _TAG)
        try:
            with self._places[peer]:
                await self._host.wait_disconnected(peer)
        finally:
            del self._places[peer], self._origins[peer]
            self._host.unprotect(peer, _TAG)

    # --- circuits

    async def _connect(self, caller: YamuxStream, target: PeerId) -> None:
        if target not in self._places:
            await self._answer(caller, Status.NO_RESERVATION)
            return
        with self._circuit(caller.remote, target) as allowed:
            if not allowed:
                await self._answer(caller, Status.RESOURCE_LIMIT_EXCEEDED)
                return
            try:
                callee = await self._stop(caller.remote, target)
            except (NetworkError, RemoteError) as e:
                log.debug("no circuit from %s to %s: %s", caller.remote, target, e)
                await self._answer(caller, Status.CONNECTION_FAILED)
                return
            try:
                await self._answer(caller, Status.OK, limit=self._limits.circuit)
                await join(caller, callee, self._limits.circuit)
            finally:
                callee.reset_now()  # nothing, if it has ended in order

    @contextmanager
    def _circuit(self, *ends: PeerId) -> Iterator[bool]:
        """Count a circuit within the block; False if there are too many."""
        if self.circuits >= self._limits.circuits or any(
            self._circuits[end] >= self._limits.circuits_per_peer for end in ends
        ):
            yield False
            return
        self._circuits.update(ends)
        try:
            yield True
        finally:
            self._circuits.subtract(ends)
            self._circuits = +self._circuits

    async def _stop(self, caller: PeerId, target: PeerId) -> YamuxStream:
        """Tell ``target`` of ``caller``; the stream that it has accepted."""
        try:
            with trio.fail_after(defaults.RELAY_ANSWER_SECONDS):
                stream = await self._host.open_direct_stream(target, (), STOP)
                try:
                    offer = StopMessage(StopType.CONNECT, peer=caller, limit=self._limits.circuit)
                    await stream.write(encode_stop(offer))
                    _check_consent(target, decode_stop(await read_message(stream)))
                except BaseException:
                    stream.reset_now()
                    raise
                return stream
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{target} does not answer within {defaults.RELAY_ANSWER_SECONDS:g} s"
            ) from None


def _check_consent(target: PeerId, answer: StopMessage) -> None:
    if answer.type != StopType.STATUS or answer.status != Status.OK:
        raise RemoteError(f"{target} refused the circuit: {status_name(answer.status)}")


async def join(one: YamuxStream, other: YamuxStream, limit: CircuitLimit) -> None:
    """Copy bytes between two streams until both have ended, one breaks, or ``limit`` is reached.

    Both are closed then, or reset. Raises nothing but cancellation.
    """
    with trio.move_on_after(limit.seconds or float("inf")) as time_left:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, one, other, limit.data_bytes)
                nursery.start_soon(_copy, other, one, limit.data_bytes)
        except* NetworkError as group:
            log.debug("circuit between %s and %s: %s", one.remote, other.remote, group.exceptions[0])
            one.reset_now()
            other.reset_now()
    if time_left.cancelled_caught:
        log.debug("circuit between %s and %s: its %d s are over", one.remote, other.remote, limit.seconds)
        one.reset_now()
        other.reset_now()


async def _copy(source: YamuxStream, sink: YamuxStream, most: int) -> None:
    copied = 0
    while data := await source.read(_COPY_BYTES):
        copied += len(data)
        if most and copied > most:
            raise NetworkError(f"its {most} bytes are over")
        await sink.write(data)
    sink.finish()
