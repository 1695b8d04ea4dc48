"""Protobuf messages whose fields are written as buffers and read where they lie.

The protobuf library copies a message's values in and out of its own memory. A BytesMessage copies neither way: it
gives buffers that may be its tensors' own memory, and what it has read are views of the bytes that came. The
format is proto3's: fields in any order, of several with one number the last counts, unknown ones are skipped.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Final, Self, TypeAlias

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

Buffer: TypeAlias = bytes | memoryview
"""Bytes to send or bytes received: one dimension, one byte per item."""

VARINT: Final = 0
DELIMITED: Final = 2

_FIXED_BYTES: Final = {1: 8, 5: 4}

Known: TypeAlias = dict[int, str]
"""The names of a message's fields by their tags: ``number << 3 | wire type``, VARINT or DELIMITED."""


class BytesMessage(abc.ABC):
    """A message that writes and reads its own bytes."""

    __slots__ = ()

    @abc.abstractmethod
    def parts(self) -> list[Buffer]:
        """Its bytes, in buffers to send one after the other.

        They may share memory with tensors: join or send them before those change.
        """

    @classmethod
    @abc.abstractmethod
    def read(cls, data: Buffer) -> Self:
        """The message that ``data`` is; it may hold views of it. Raises RemoteError naming the wrong field."""

    def length(self) -> int:
        """How many bytes ``parts`` has."""
        return total(self.parts())

    def copied(self) -> Self:
        """The same message in memory of its own, as long as itself: to keep without the bytes that it came in."""
        return self.read(b"".join(self.parts()))


def total(parts: Iterable[Buffer]) -> int:
    return sum(map(len, parts))


def number_field(tag: int, value: int) -> bytes:
    """A field that is a number, or nothing for zero."""
    return encode_uvarint(tag) + encode_uvarint(value) if value else b""


def bytes_field(tag: int, value: bytes) -> bytes:
    """A field that is bytes or text, or nothing for none."""
    return field_header(tag, len(value)) + value if value else b""


def field_header(tag: int, length: int) -> bytes:
    """What stands before ``length`` bytes of a field."""
    return encode_uvarint(tag) + encode_uvarint(length)


def read_fields(data: memoryview, known: Known) -> list[tuple[int, int, memoryview]]:
    """The known fields in their order: the field's tag, its value or length, and its bytes.

    Raises RemoteError naming the field: for a wire type that it may not have, for bytes that end within it, and
    beyond ``defaults.MAX_MESSAGE_FIELDS``.
    """
    found: list[tuple[int, int, memoryview]] = []
    at, end = 0, len(data)
    for _ in range(defaults.MAX_MESSAGE_FIELDS):
        if at == end:
            return found
        # most numbers take one byte: not to call read_varint for them is worth a third of the time
        tag, at = (data[at], at + 1) if data[at] < 0x80 else read_varint(data, at, "field number")
        name = known.get(tag) or _unknown(tag, known)
        wire_type, start = tag & 7, at
        if wire_type in _FIXED_BYTES:
            value = _FIXED_BYTES[wire_type]
        elif at < end and data[at] < 0x80:
            value, at = data[at], at + 1
        else:
            value, at = read_varint(data, at, name)
        if wire_type != VARINT:
            start, at = at, at + value
            if at > end:
                raise RemoteError(f"{name} ends after {end - start} of {value} bytes")
        if tag in known:
            found.append((tag, value, data[start:at]))
    if at < end:
        raise RemoteError(f"more than {defaults.MAX_MESSAGE_FIELDS} fields")
    return found


def _unknown(tag: int, known: Known) -> str:
    """The name of a field to skip. Raises RemoteError for a known one, which has another wire type than it may."""
    number, wire_type = tag >> 3, tag & 7
    name = next((known[other] for other in known if other >> 3 == number), "")
    if name or not number or wire_type not in (VARINT, DELIMITED, *_FIXED_BYTES):
        raise RemoteError(f"{name or f'field {number}'} has wire type {wire_type}")
    return f"field {number}"


def read_varint(data: memoryview, at: int, name: str) -> tuple[int, int]:
    """The number at ``at`` and where it ends. Raises RemoteError naming the field."""
    try:
        parsed = decode_uvarint(data, at)
    except RemoteError as e:
        raise RemoteError(f"{name}: {e}") from e
    if parsed is None:
        raise RemoteError(f"{name} ends early")
    return parsed
