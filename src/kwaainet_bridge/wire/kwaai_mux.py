"""Messages of ``/kwaai/inference-mux/1.0.0``: HTTP requests and leases over one long-lived stream.

A frame is ``[u32 length, little-endian][message]``, without an envelope; a message is an enum in msgpack (see
kwaai_msgpack). Responses come in any order and carry their request's number. Status 409 means that the lease of the
request has ended. Peers may send requests without a lease.

Source: KwaaiNet v0.6.2, ``kwaai-cli/src/inference_mux.rs``; its limit of a frame is 64 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import Buffer, total
from kwaainet_bridge.wire.kwaai_lease import Outcome, outcome_value, read_model, read_outcome
from kwaainet_bridge.wire.kwaai_msgpack import Cursor, Reader, Value, check_unsigned, required, variant_parts
from kwaainet_bridge.wire.prefixed import PrefixedDecoder

PROTOCOL: Final = "/kwaai/inference-mux/1.0.0"

STALE_LEASE: Final = 409
"""Status of a response whose request had a lease that is unknown or has expired."""

_LENGTH_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxRequest:
    """An HTTP request for the server's OpenAI-compatible endpoint. ``path`` begins where its address ends.

    Nothing of it is safe to pass on unchecked: method, path and body are the peer's choice.
    """

    request_id: int
    method: str
    path: str
    body: Buffer = b""
    lease_id: int | None = None

    def __post_init__(self) -> None:
        check_unsigned("request_id", self.request_id, 64)
        check_unsigned("lease_id", self.lease_id or 0, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxResponse:
    """The answer to the request of that number; ``status`` is HTTP's, or STALE_LEASE."""

    request_id: int
    status: int
    body: Buffer = b""

    def __post_init__(self) -> None:
        check_unsigned("request_id", self.request_id, 64)
        check_unsigned("status", self.status, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLeaseRequest:
    """Asks for a lease; ``model`` is None where the caller does not know which one it will need."""

    request_id: int
    model: str | None = None

    def __post_init__(self) -> None:
        check_unsigned("request_id", self.request_id, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLeaseResponse:
    """The outcome of the lease request of that number."""

    request_id: int
    outcome: Outcome

    def __post_init__(self) -> None:
        check_unsigned("request_id", self.request_id, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLeaseRelease:
    """The lease is not needed any more. Has no answer."""

    lease_id: int

    def __post_init__(self) -> None:
        check_unsigned("lease_id", self.lease_id, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLeaseKeepalive:
    """The lease is still needed, though no request was made for half its time. Has no answer."""

    lease_id: int

    def __post_init__(self) -> None:
        check_unsigned("lease_id", self.lease_id, 64)


@dataclass(frozen=True, slots=True)
class MuxUnknown:
    """A message that later versions may have: ignore it, as KwaaiNet's peers do, and stay on the stream."""

    name: str


MuxMessage: TypeAlias = (
    MuxRequest | MuxResponse | MuxLeaseRequest | MuxLeaseResponse | MuxLeaseRelease | MuxLeaseKeepalive
)


def message_parts(message: MuxMessage) -> list[Buffer]:
    """The msgpack of a message, in buffers to send one after the other; bodies go from where they lie."""
    fields: dict[str, Value]
    match message:
        case MuxRequest():
            name = "Request"
            fields = {
                "request_id": message.request_id,
                "method": message.method,
                "path": message.path,
                "body": message.body,
                "lease_id": message.lease_id,
            }
        case MuxResponse():
            name = "Response"
            fields = {"request_id": message.request_id, "status": message.status, "body": message.body}
        case MuxLeaseRequest():
            name = "LeaseRequest"
            fields = {"request_id": message.request_id, "model": message.model}
        case MuxLeaseResponse():
            name = "LeaseResponse"
            fields = {"request_id": message.request_id, "outcome": outcome_value(message.outcome)}
        case MuxLeaseRelease():
            name, fields = "LeaseRelease", {"lease_id": message.lease_id}
        case MuxLeaseKeepalive():
            name, fields = "LeaseKeepalive", {"lease_id": message.lease_id}
    return variant_parts(name, fields)


def encode_frame(message: MuxMessage, *, max_bytes: int = defaults.MAX_MUX_FRAME_BYTES) -> bytes:
    """A message with its length in front. Raises ValueError for one that peers refuse for its length."""
    parts = message_parts(message)
    length = total(parts)
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes, at most {max_bytes} may be sent")
    return b"".join([length.to_bytes(_LENGTH_BYTES, "little"), *parts])


def read_message(data: Buffer) -> MuxMessage | MuxUnknown:
    """The message that ``data`` is, whose body is a view of it. Raises RemoteError naming the wrong field."""
    cursor = Cursor(data)
    name, has_content = cursor.variant("the message")
    read = _READERS.get(name)
    if read is not None and not has_content:
        raise RemoteError(f"the message is {name} without its content")
    if read is not None:
        message: MuxMessage | MuxUnknown = read(cursor, name)
    else:
        if has_content:
            cursor.skip("the content of an unknown message")
        message = MuxUnknown(name)
    cursor.end()
    return message


def _request(cursor: Cursor, name: str) -> MuxMessage:
    readers: dict[str, Reader] = {
        "request_id": cursor.u64,
        "method": partial(cursor.text, max_bytes=defaults.MAX_HTTP_METHOD_BYTES),
        "path": partial(cursor.text, max_bytes=defaults.MAX_HTTP_PATH_BYTES),
        "body": cursor.octets,
        "lease_id": partial(cursor.optional, reader=cursor.u64),
    }
    found = cursor.entries(name, readers)
    required(found, "request_id", "method", "path", "body")
    return MuxRequest(**found)


def _response(cursor: Cursor, name: str) -> MuxMessage:
    readers: dict[str, Reader] = {
        "request_id": cursor.u64,
        "status": cursor.u16,
        "body": cursor.octets,
    }
    found = cursor.entries(name, readers)
    required(found, "request_id", "status", "body")
    return MuxResponse(**found)


def _lease_request(cursor: Cursor, name: str) -> MuxMessage:
    found = cursor.entries(name, {"request_id": cursor.u64, "model": partial(read_model, cursor)})
    required(found, "request_id")
    return MuxLeaseRequest(**found)


def _lease_response(cursor: Cursor, name: str) -> MuxMessage:
    found = cursor.entries(name, {"request_id": cursor.u64, "outcome": partial(read_outcome, cursor)})
    required(found, "request_id", "outcome")
    return MuxLeaseResponse(**found)


def _lease_release(cursor: Cursor, name: str) -> MuxMessage:
    (lease_id,) = required(cursor.entries(name, {"lease_id": cursor.u64}), "lease_id")
    return MuxLeaseRelease(lease_id=lease_id)


def _lease_keepalive(cursor: Cursor, name: str) -> MuxMessage:
    (lease_id,) = required(cursor.entries(name, {"lease_id": cursor.u64}), "lease_id")
    return MuxLeaseKeepalive(lease_id=lease_id)


_READERS: Final[dict[str, Callable[[Cursor, str], MuxMessage]]] = {
    "Request": _request,
    "Response": _response,
    "LeaseRequest": _lease_request,
    "LeaseResponse": _lease_response,
    "LeaseRelease": _lease_release,
    "LeaseKeepalive": _lease_keepalive,
}


class MuxDecoder(PrefixedDecoder[MuxMessage | MuxUnknown]):
    """Cuts a stream into messages whose frames are at most ``max_bytes`` long. See PrefixedDecoder.

    A message that does not decode ends the stream, as a length beyond the limit does; one of an unknown name does
    not. (KwaaiNet's peers log the former and read on.)
    """

    _name = "mux frame"
    _longest_header = _LENGTH_BYTES

    def __init__(self, max_bytes: int = defaults.MAX_MUX_FRAME_BYTES) -> None:
        super().__init__(max_bytes)

    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        if len(header) < _LENGTH_BYTES:
            return None
        return 0, int.from_bytes(header, "little"), _LENGTH_BYTES

    def _build(self, tag: int, body: bytes) -> MuxMessage | MuxUnknown:  # noqa: ARG002 - a frame has no tag
        return read_message(body)
