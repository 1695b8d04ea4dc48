"""Messages of circuit relay v2 and of hole punching, each with a varint length in front.

Source: libp2p specifications ``relay/circuit-v2.md`` and ``relay/DCUtR.md``; go-libp2p v0.32.1 in hivemind 1.1.12's
p2pd, ``p2p/protocol/circuitv2`` and ``p2p/protocol/holepunch``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.pb import circuit_pb2
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.varint import encode_uvarint

HOP: Final = "/libp2p/circuit/relay/0.2.0/hop"
"""Asked of a relay: reserve a place, or connect to a peer that has one."""
STOP: Final = "/libp2p/circuit/relay/0.2.0/stop"
"""A relay tells a peer that somebody wants to connect to it."""
DCUTR: Final = "/libp2p/dcutr"
"""Two peers behind a relay agree on when to dial each other directly."""

MAX_MESSAGE_BYTES: Final = 4096
"""Longest message of all three (go-libp2p: the same)."""

M = TypeVar("M", bound=Message)


class HopType(enum.IntEnum):
    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(enum.IntEnum):
    CONNECT = 0
    STATUS = 1


class PunchType(enum.IntEnum):
    CONNECT = 100
    SYNC = 300


class Status(enum.IntEnum):
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """What a relay carries in one circuit: seconds, and bytes in each direction; 0 means no limit."""

    seconds: int = 0
    data_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HopMessage:
    """``type`` and ``status`` are numbers as sent: later versions of the protocol may know more of them.

    ``expires`` (unix seconds) and ``addresses`` (binary multiaddrs, uninterpreted) are the reservation's, of a STATUS
    that grants one.
    """

    type: int
    peer: PeerId | None = None
    status: int | None = None
    expires: int | None = None
    addresses: tuple[bytes, ...] = ()
    limit: CircuitLimit | None = None


@dataclass(frozen=True, slots=True)
class StopMessage:
    """Numbers as sent, as in :class:`HopMessage`."""

    type: int
    peer: PeerId | None = None
    status: int | None = None
    limit: CircuitLimit | None = None


@dataclass(frozen=True, slots=True)
class PunchMessage:
    """``addresses`` are the sender's, binary multiaddrs as others see it."""

    type: int
    addresses: tuple[bytes, ...] = ()


def status_name(status: int | None) -> str:
    """What a status number means, for people."""
    try:
        return Status(status).name if status is not None else "no status"
    except ValueError:
        return f"status {status}"


def encode_hop(message: HopMessage) -> bytes:
    """The complete wire bytes."""
    body = circuit_pb2.HopMessage(
        type=message.type, status=message.status, limit=_limit_message(message.limit)
    )
    if message.peer is not None:
        body.peer.id = message.peer.raw
    if message.expires is not None:
        body.reservation.expire = message.expires
        body.reservation.addrs.extend(message.addresses)
    return _delimited(body)


def decode_hop(data: bytes) -> HopMessage:
    """Read a message without its length. RemoteError if it is malformed or names no type."""
    body = _parse(circuit_pb2.HopMessage, data, "relay hop")
    reserved = body.HasField("reservation")
    return HopMessage(
        body.type,
        peer=_peer(body),
        status=body.status if body.HasField("status") else None,
        expires=body.reservation.expire if reserved else None,
        addresses=tuple(body.reservation.addrs) if reserved else (),
        limit=_limit(body),
    )


def encode_stop(message: StopMessage) -> bytes:
    """The complete wire bytes."""
    limit = _limit_message(message.limit)
    body = circuit_pb2.StopMessage(type=message.type, status=message.status, limit=limit)
    if message.peer is not None:
        body.peer.id = message.peer.raw
    return _delimited(body)


def decode_stop(data: bytes) -> StopMessage:
    """Read a message without its length. RemoteError if it is malformed or names no type."""
    body = _parse(circuit_pb2.StopMessage, data, "relay stop")
    status = body.status if body.HasField("status") else None
    return StopMessage(body.type, peer=_peer(body), status=status, limit=_limit(body))


def encode_punch(kind: int, addresses: Sequence[bytes] = ()) -> bytes:
    """The complete wire bytes."""
    return _delimited(circuit_pb2.HolePunch(type=kind, obs_addrs=addresses))


def decode_punch(data: bytes) -> PunchMessage:
    """Read a message without its length. RemoteError if it is malformed or names no type."""
    body = _parse(circuit_pb2.HolePunch, data, "hole punch")
    return PunchMessage(body.type, tuple(body.obs_addrs))


def _delimited(message: Message) -> bytes:
    body: bytes = message.SerializeToString()
    return encode_uvarint(len(body)) + body


def _parse(kind: type[M], data: bytes, name: str) -> M:
    try:
        message = kind.FromString(data)
    except DecodeError as e:
        raise RemoteError(f"{name}: does not decode: {e}") from e
    if not message.HasField("type"):
        raise RemoteError(f"{name}: type is absent")
    return message


def _peer(message: circuit_pb2.HopMessage | circuit_pb2.StopMessage) -> PeerId | None:
    return PeerId(message.peer.id) if message.HasField("peer") else None


def _limit(message: circuit_pb2.HopMessage | circuit_pb2.StopMessage) -> CircuitLimit | None:
    if not message.HasField("limit"):
        return None
    return CircuitLimit(message.limit.duration, message.limit.data)


def _limit_message(limit: CircuitLimit | None) -> circuit_pb2.Limit | None:
    return None if limit is None else circuit_pb2.Limit(duration=limit.seconds, data=limit.data_bytes)
