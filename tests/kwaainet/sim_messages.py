"""KwaaiNet's msgpack messages as its Rust peers write and read them.

Structures are maps with string keys in the documented order; bytes go out as arrays of integers and come in as those
or as ``bin``; enums are tagged from outside. Reading is as strict as their typed decoders: whole numbers in range, no missing fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from sim_envelope import BrokenRules

INFERENCE = "/kwaai/inference/1.0.0"
HELLO = "/kwaai/p2p/hello/1.0.0"
LEASE = "/kwaai/capacity-lease/1.0.0"
MUX = "/kwaai/inference-mux/1.0.0"
TENSOR = "/kwaai/tensor/1.0.0"

TOKEN_IDS, HIDDEN_STATES, LOGITS = "token_ids", "hidden_states", "logits"
WARMING_UP = "node warming up — model loading in background"
MUX_FRAME_BYTES = 64 * 1024 * 1024

_U32, _U64 = 2**32 - 1, 2**64 - 1


def pack_message(value: Any) -> bytes:
    return msgpack.packb(value, use_bin_type=True, strict_types=True)


def unpack_message(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as e:
        raise BrokenRules(f"not msgpack: {data[:40].hex()}: {e}") from e


def _map(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BrokenRules(f"{what} is not a map: {value!r:.80}")
    return value


def _take(fields: dict[str, Any], key: str, what: str) -> Any:
    if key not in fields:
        raise BrokenRules(f"{what} without {key}")
    return fields[key]


def _whole(value: Any, limit: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise BrokenRules(f"{what} is not a whole number up to {limit}: {value!r:.40}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BrokenRules(f"{what} is not text: {value!r:.40}")
    return value


def _octets(value: Any, what: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and all(type(x) is int and 0 <= x < 256 for x in value):
        return bytes(value)
    raise BrokenRules(f"{what} is not bytes: {value!r:.40}")


def _shape(value: Any, what: str) -> list[int]:
    if not isinstance(value, list):
        raise BrokenRules(f"{what} is not an array: {value!r:.40}")
    return [_whole(x, _U32, what) for x in value]


# --- inference


@dataclass(frozen=True)
class InferenceRequest:
    session_id: int
    seq_pos: int
    payload_type: str
    shape: list[int]
    data: bytes

    @classmethod
    def of_ids(cls, session_id: int, seq_pos: int, ids: Sequence[int]) -> InferenceRequest:
        return cls(session_id, seq_pos, TOKEN_IDS, [len(ids)], np.asarray(ids, "<u4").tobytes())

    @classmethod
    def of_hidden(cls, session_id: int, seq_pos: int, hidden: np.ndarray) -> InferenceRequest:
        """``hidden``: ``[1, seq, hidden]``, any float; sent as float16."""
        return cls(session_id, seq_pos, HIDDEN_STATES, list(hidden.shape), hidden.astype("<f2").tobytes())

    def encode(self) -> bytes:
        return pack_message({
            "session_id": self.session_id,
            "seq_pos": self.seq_pos,
            "payload_type": self.payload_type,
            "shape": self.shape,
            "data": list(self.data),
        })  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> InferenceRequest:
        what = "an inference request"
        fields = _map(unpack_message(data), what)
        request = cls(
            _whole(_take(fields, "session_id", what), _U64, "session_id"),
            _whole(_take(fields, "seq_pos", what), _U32, "seq_pos"),
            _text(_take(fields, "payload_type", what), "payload_type"),
            _shape(_take(fields, "shape", what), "shape"),
            _octets(_take(fields, "data", what), "data"),
        )
        size = {TOKEN_IDS: 4, HIDDEN_STATES: 2}.get(request.payload_type)
        if size is None:
            raise BrokenRules(f"payload_type {request.payload_type!r}")
        if len(request.shape) != (1 if request.payload_type == TOKEN_IDS else 3):
            raise BrokenRules(f"{request.payload_type} of shape {request.shape}")
        if len(request.data) != math.prod(request.shape) * size:
            raise BrokenRules(f"{len(request.data)} bytes of {request.payload_type} of shape {request.shape}")
        return request

    def ids(self) -> list[int]:
        return np.frombuffer(self.data, "<u4").tolist()

    def hidden(self) -> np.ndarray:
        """float16, as sent."""
        return np.frombuffer(self.data, "<f2").reshape(self.shape)


@dataclass(frozen=True)
class InferenceAnswer:
    """``data`` is float16; with ``error`` it and the shape are empty."""

    session_id: int
    response_type: str
    shape: list[int]
    data: bytes
    error: str | None = None

    def encode(self) -> bytes:
        return pack_message({
            "session_id": self.session_id,
            "response_type": self.response_type,
            "shape": self.shape,
            "data": list(self.data),
            "error": self.error,
        })  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> InferenceAnswer:
        what = "an inference answer"
        fields = _map(unpack_message(data), what)
        error = fields.get("error")
        return cls(
            _whole(_take(fields, "session_id", what), _U64, "session_id"),
            _text(_take(fields, "response_type", what), "response_type"),
            _shape(_take(fields, "shape", what), "shape"),
            _octets(_take(fields, "data", what), "data"),
            None if error is None else _text(error, "error"),
        )

    def values(self) -> np.ndarray:
        """float16 in the answer's shape. BrokenRules if the two do not fit."""
        if len(self.data) != 2 * math.prod(self.shape):
            raise BrokenRules(f"{len(self.data)} bytes in an answer of shape {self.shape}")
        return np.frombuffer(self.data, "<f2").reshape(self.shape)


# --- leases


@dataclass(frozen=True)
class Granted:
    lease_id: int
    ttl_secs: int


@dataclass(frozen=True)
class DeniedAtCapacity:
    retry_after_secs: int


WRONG_MODEL, LEASE_UNKNOWN = "DeniedWrongModel", "DeniedLeaseUnknown"
PROTOCOL_UNSUPPORTED = "DeniedProtocolUnsupported"
_BARE = (WRONG_MODEL, LEASE_UNKNOWN, PROTOCOL_UNSUPPORTED)

LeaseOutcome = Granted | DeniedAtCapacity | str
"""A grant, or a denial; those without numbers are bare strings."""


def lease_request(model: str | None) -> bytes:
    return pack_message({"model": model})


def read_lease_request(data: bytes) -> str | None:
    model = _map(unpack_message(data), "a lease request").get("model")
    return None if model is None else _text(model, "model")


def outcome_value(outcome: LeaseOutcome) -> Any:
    match outcome:
        case Granted(lease_id, ttl_secs):
            return {"Granted": {"lease_id": lease_id, "ttl_secs": ttl_secs}}
        case DeniedAtCapacity(retry_after_secs):
            return {"DeniedAtCapacity": {"retry_after_secs": retry_after_secs}}
        case _:
            return outcome


def read_outcome(value: Any) -> LeaseOutcome:
    if isinstance(value, str) and value in _BARE:
        return value
    tag, fields = _variant(value, "a lease outcome")
    if tag == "Granted":
        return Granted(
            _whole(_take(fields, "lease_id", tag), _U64, "lease_id"),
            _whole(_take(fields, "ttl_secs", tag), _U64, "ttl_secs"),
        )
    if tag == "DeniedAtCapacity":
        return DeniedAtCapacity(_whole(_take(fields, "retry_after_secs", tag), _U64, "retry_after_secs"))
    raise BrokenRules(f"lease outcome {tag!r}")


def _variant(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict) or len(value) != 1:
        raise BrokenRules(f"{what} is not a map of one tag: {value!r:.80}")
    ((tag, fields),) = value.items()
    return _text(tag, what), _map(fields, what)


# --- mux


@dataclass(frozen=True)
class MuxFrame:
    """One frame: its tag (``Request``, ``Response``, …) and its fields, ``body`` as bytes."""

    tag: str
    fields: dict[str, Any]

    def encode(self) -> bytes:
        """With its length, u32 little-endian."""
        fields = {k: list(v) if isinstance(v, bytes) else v for k, v in self.fields.items()}
        body = pack_message({self.tag: fields})
        return len(body).to_bytes(4, "little") + body

    @classmethod
    def decode(cls, body: bytes) -> MuxFrame:
        """Without its length."""
        tag, fields = _variant(unpack_message(body), "a mux frame")
        if tag not in _MUX_FIELDS:
            raise BrokenRules(f"mux frame {tag!r}")
        read = {}
        for key, reader in _MUX_FIELDS[tag].items():
            optional = reader in (_id_or_nil, _text_or_nil)  # nil and missing are the same
            read[key] = reader(fields.get(key) if optional else _take(fields, key, tag), key)
        return cls(tag, read)


def _id(value: Any, what: str) -> int:
    return _whole(value, _U64, what)


def _id_or_nil(value: Any, what: str) -> int | None:
    return None if value is None else _whole(value, _U64, what)


def _text_or_nil(value: Any, what: str) -> str | None:
    return None if value is None else _text(value, what)


def _status(value: Any, what: str) -> int:
    return _whole(value, 2**16 - 1, what)


def _outcome(value: Any, what: str) -> LeaseOutcome:
    return read_outcome(value)


_MUX_FIELDS: dict[str, dict[str, Any]] = {
    "Request": {"request_id": _id, "method": _text, "path": _text, "body": _octets, "lease_id": _id_or_nil},
    "Response": {"request_id": _id, "status": _status, "body": _octets},
    "LeaseRequest": {"request_id": _id, "model": _text_or_nil},
    "LeaseResponse": {"request_id": _id, "outcome": _outcome},
    "LeaseRelease": {"lease_id": _id},
    "LeaseKeepalive": {"lease_id": _id},
}


async def read_mux_frame(reader: Any) -> MuxFrame | None:
    """The next frame, or None at the end of the stream."""
    if await reader.at_end():
        return None
    return MuxFrame.decode(await reader.sized("little", MUX_FRAME_BYTES))
