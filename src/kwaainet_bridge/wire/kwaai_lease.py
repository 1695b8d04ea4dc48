"""Requests and replies of ``/kwaai/capacity-lease/1.0.0``: a peer asks for one of a server's places.

Unary calls in Hivemind's envelope, msgpack within (see kwaai_msgpack). The mux protocol carries the same outcome.
A lease lasts for ``ttl_secs`` (30 s) after the last request made under it. A denial is an answer of a peer that is
well: do not count it as a failure.

Source: KwaaiNet v0.6.2, ``kwaai-cli/src/capacity_lease.rs``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self, TypeAlias

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import Buffer, BytesMessage
from kwaainet_bridge.wire.kwaai_msgpack import Cursor, check_unsigned, map_parts, required
from kwaainet_bridge.wire.msgpack import pack

PROTOCOL: Final = "/kwaai/capacity-lease/1.0.0"

_GRANTED: Final = "Granted"


class Denial(enum.StrEnum):
    """Why there is no lease. KwaaiNet's own enum has ``PeerUnreachable`` as well, which never travels."""

    AT_CAPACITY = "DeniedAtCapacity"
    WRONG_MODEL = "DeniedWrongModel"
    LEASE_UNKNOWN = "DeniedLeaseUnknown"
    PROTOCOL_UNSUPPORTED = "DeniedProtocolUnsupported"


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, u64, and how many seconds it lasts, u32. Raises ValueError for numbers beyond that."""

    lease_id: int
    ttl_secs: int

    def __post_init__(self) -> None:
        check_unsigned("lease_id", self.lease_id, 64)
        check_unsigned("ttl_secs", self.ttl_secs, 32)


@dataclass(frozen=True, slots=True)
class Denied:
    """No lease. ``retry_after_secs``, u32, belongs to AT_CAPACITY and is 0 for the others, or ValueError is raised."""

    reason: Denial
    retry_after_secs: int = 0

    def __post_init__(self) -> None:
        check_unsigned("retry_after_secs", self.retry_after_secs, 32)
        if self.retry_after_secs and self.reason != Denial.AT_CAPACITY:
            raise ValueError(f"{self.reason} says nothing of a later time")


Outcome: TypeAlias = Granted | Denied


@dataclass(frozen=True, slots=True)
class LeaseRequest(BytesMessage):
    """Asks for a place. ``model`` is None where the caller does not know which one it will need."""

    model: str | None = None

    def parts(self) -> list[Buffer]:
        return map_parts({"model": self.model})

    @classmethod
    def read(cls, data: Buffer) -> Self:
        cursor = Cursor(data)
        found = cursor.entries("the request", {"model": partial(read_model, cursor)})
        cursor.end()
        return cls(found.get("model"))


@dataclass(frozen=True, slots=True)
class LeaseReply(BytesMessage):
    """The outcome."""

    outcome: Outcome

    def parts(self) -> list[Buffer]:
        return [pack(outcome_value(self.outcome))]

    @classmethod
    def read(cls, data: Buffer) -> Self:
        cursor = Cursor(data)
        outcome = read_outcome(cursor, "the outcome")
        cursor.end()
        return cls(outcome)


def read_model(cursor: Cursor, name: str) -> str | None:
    """A model's name, or None for nil. Raises RemoteError."""
    return cursor.optional(name, partial(cursor.text, max_bytes=defaults.MAX_MODEL_NAME_BYTES))


def outcome_value(outcome: Outcome) -> dict[str, Any] | str:
    """What is packed for an outcome."""
    if isinstance(outcome, Granted):
        return {_GRANTED: {"lease_id": outcome.lease_id, "ttl_secs": outcome.ttl_secs}}
    if outcome.reason == Denial.AT_CAPACITY:
        return {outcome.reason.value: {"retry_after_secs": outcome.retry_after_secs}}
    return outcome.reason.value


def read_outcome(cursor: Cursor, name: str) -> Outcome:
    """Reads an outcome at the cursor. Raises RemoteError, for a variant that this version does not know as well."""
    variant, has_content = cursor.variant(name)
    if variant in (_GRANTED, Denial.AT_CAPACITY) and not has_content:
        raise RemoteError(f"{name} is {variant} without its content")
    if variant == _GRANTED:
        found = cursor.entries(variant, {"lease_id": cursor.u64, "ttl_secs": cursor.u32})
        return Granted(*required(found, "lease_id", "ttl_secs"))
    if variant == Denial.AT_CAPACITY:
        found = cursor.entries(variant, {"retry_after_secs": cursor.u32})
        return Denied(Denial.AT_CAPACITY, *required(found, "retry_after_secs"))
    try:
        denied = Denied(Denial(variant))
    except ValueError as e:
        raise RemoteError(f"{name} is {variant!r:.60}, which is neither {_GRANTED} nor a known denial") from e
    if has_content:
        cursor.nil(variant)
    return denied
