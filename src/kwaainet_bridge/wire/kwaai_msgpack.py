"""msgpack as KwaaiNet's peers write it: maps whose keys are text, enums tagged by the name of their variant.

Values are read where they lie, one after the other, each as the type that its field has: nothing is made of what
a message should not hold, and bytes are views of what came.

Source: KwaaiNet v0.6.2 with rmp-serde 1.3.1. Its writers send bytes as arrays of integers; its readers take those
and ``bin``, skip keys that they do not know and take an absent optional field for nil. It sends a variant without
content as bare text, one with content as a map of one pair.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import Buffer
from kwaainet_bridge.wire.kwaai_octets import read_octets
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.msgpack_bounds import value_end

T = TypeVar("T")
Choice = TypeVar("Choice", bound=enum.StrEnum)

_INTEGER, _TEXT, _BYTES, _ARRAY, _MAP, _NIL = "an integer", "text", "bytes", "an array", "a map", "nil"

# what the first byte of a value says it is, how many bytes of a number follow, and whether that is signed
_WIDE: Final[dict[int, tuple[str, int, bool]]] = {
    0xC0: (_NIL, 0, False),
    0xC1: ("a byte that msgpack never uses", 0, False),
    **dict.fromkeys([0xC2, 0xC3], ("a boolean", 0, False)),
    **{0xC4 + i: (_BYTES, 1 << i, False) for i in range(3)},
    **dict.fromkeys([0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)], ("an extension", 0, False)),
    **dict.fromkeys([0xCA, 0xCB], ("a float", 0, False)),
    **{0xCC + i: (_INTEGER, 1 << i, False) for i in range(4)},
    **{0xD0 + i: (_INTEGER, 1 << i, True) for i in range(4)},
    **{0xD9 + i: (_TEXT, 1 << i, False) for i in range(3)},
    **{0xDC + i: (_ARRAY, 2 << i, False) for i in range(2)},
    **{0xDE + i: (_MAP, 2 << i, False) for i in range(2)},
}

_MAX_NAME_BYTES: Final = 64
"""Of a key that is read and of a variant. The longest that exist have 24."""

Reader: TypeAlias = Callable[[str], Any]
"""Reads the value at the cursor; it is told the name of the field for its errors."""

Value: TypeAlias = int | str | Buffer | Sequence[int] | dict[str, Any] | None


class Cursor:
    """Reads one msgpack message, value by value.

    Every method raises RemoteError naming the field for a value of another type or beyond its bounds and for
    bytes that end early; the cursor is of no use after that. No count or length is believed before as many bytes
    are there.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._items = defaults.MAX_MSGPACK_ITEMS  # that may still be skipped

    def end(self) -> None:
        """Nothing may follow."""
        if self._at != len(self._data):
            raise RemoteError(f"{len(self._data) - self._at} bytes follow the message")

    def entries(self, name: str, readers: Mapping[str, Reader]) -> dict[str, Any]:
        """The entries of a map whose keys have a reader, whatever their order; the other ones are skipped.

        A known key may come once. Absent ones are absent: see required.
        """
        count = self._expect(name, _MAP)
        if count > defaults.MAX_MESSAGE_FIELDS:
            raise RemoteError(
                f"{name} has {count} entries, at most {defaults.MAX_MESSAGE_FIELDS} are accepted"
            )
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._key(name)
            reader = readers.get(key)
            if reader is None:
                self._skip(f"{name}: an entry of an unknown key")
            elif key in found:
                raise RemoteError(f"{key} comes twice")
            else:
                found[key] = reader(key)
        return found

    def variant(self, name: str) -> tuple[str, bool]:
        """The name of an enum's variant, and whether its content follows."""
        kind, count = self._head(name)
        if kind == _TEXT:
            return self._decode(name, count, _MAX_NAME_BYTES), False
        if kind != _MAP or count != 1:
            raise RemoteError(f"{name} is {kind}{f' of {count} pairs' * (kind == _MAP)}, not one variant")
        return self.text(name, _MAX_NAME_BYTES), True

    def nil(self, name: str) -> None:
        """The content of a variant that has none."""
        self._expect(name, _NIL)

    def skip(self, name: str) -> None:
        """Any value."""
        self._skip(name)

    def u64(self, name: str) -> int:
        return self._unsigned(name, 64)

    def u32(self, name: str) -> int:
        return self._unsigned(name, 32)

    def u16(self, name: str) -> int:
        return self._unsigned(name, 16)

    def shape(self, name: str) -> tuple[int, ...]:
        """An array of dimensions, each an u32."""
        count = self._expect(name, _ARRAY)
        if count > defaults.MAX_TENSOR_DIMENSIONS:
            raise RemoteError(
                f"{name} has {count} dimensions, at most {defaults.MAX_TENSOR_DIMENSIONS} are accepted"
            )
        return tuple(self._unsigned(name, 32) for _ in range(count))

    def octets(self, name: str) -> Buffer:
        """Bytes: a view of those that came as such, a copy of those that came as integers."""
        kind, count = self._head(name)
        if kind == _BYTES:
            return self._take(name, count)
        if kind != _ARRAY:
            raise RemoteError(f"{name} is {kind}, neither bytes nor an array of them")
        octets, self._at = read_octets(self._data, self._at, count, name)
        return octets

    def text(self, name: str, max_bytes: int) -> str:
        return self._decode(name, self._expect(name, _TEXT), max_bytes)

    def beginning(self, name: str) -> str:
        """The first ``defaults.MAX_ERROR_CHARACTERS`` of a text for people, bad UTF-8 replaced."""
        content = self._take(name, self._expect(name, _TEXT))
        return str(content[: 4 * defaults.MAX_ERROR_CHARACTERS], "utf-8", "replace")[
            : defaults.MAX_ERROR_CHARACTERS
        ]

    def choice(self, name: str, among: type[Choice]) -> Choice:
        """One of an enum's variants without content."""
        variant, has_content = self.variant(name)
        try:
            chosen = among(variant)
        except ValueError as e:
            raise RemoteError(f"{name} is {variant!r:.60}, none of {', '.join(among)}") from e
        if has_content:
            self.nil(name)
        return chosen

    def optional(self, name: str, reader: Callable[[str], T]) -> T | None:
        """What ``reader`` reads, or None for nil."""
        if self._at < len(self._data) and self._data[self._at] == 0xC0:
            self._at += 1
            return None
        return reader(name)

    def _key(self, name: str) -> str:
        content = self._take(f"a key of {name}", self._expect(f"a key of {name}", _TEXT))
        # one that is longer is unknown, whatever it says; so is one that is no UTF-8
        return str(content[: _MAX_NAME_BYTES + 1], "utf-8", "replace")

    def _skip(self, name: str) -> None:
        self._at, items = value_end(
            self._data,
            self._at,
            nested_ext=frozenset(),
            max_depth=defaults.MAX_MSGPACK_DEPTH,
            max_items=self._items,
            name=name,
        )
        self._items -= items

    def _unsigned(self, name: str, bits: int) -> int:
        value = self._expect(name, _INTEGER)
        if not 0 <= value < 1 << bits:
            raise RemoteError(f"{name} is {value}, which is not within {bits} bits")
        return value

    def _decode(self, name: str, length: int, max_bytes: int) -> str:
        content = self._take(name, length)
        if length > max_bytes:
            raise RemoteError(f"{name} has {length} bytes, at most {max_bytes} are accepted")
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as e:
            raise RemoteError(f"{name} is not UTF-8") from e

    def _take(self, name: str, length: int) -> memoryview:
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise RemoteError(f"{name} ends after {len(self._data) - start} of {length} bytes")
        return self._data[start : self._at]

    def _expect(self, name: str, kind: str) -> int:
        found, number = self._head(name)
        if found != kind:
            raise RemoteError(f"{name} is {found}, not {kind}")
        return number

    def _head(self, name: str) -> tuple[str, int]:
        """What the value at the cursor is, and its number, length or count; the cursor stands behind that then."""
        if self._at >= len(self._data):
            raise RemoteError(f"{name} ends early")
        first = self._data[self._at]
        self._at += 1
        if first < 0x80:
            return _INTEGER, first
        if first < 0x90:
            return _MAP, first & 0x0F
        if first < 0xA0:
            return _ARRAY, first & 0x0F
        if first < 0xC0:
            return _TEXT, first & 0x1F
        if first >= 0xE0:
            return _INTEGER, first - 0x100
        kind, length, signed = _WIDE[first]
        return kind, int.from_bytes(self._take(name, length), "big", signed=signed)


def required(found: Mapping[str, Any], *keys: str) -> list[Any]:
    """The values of ``keys``. Raises RemoteError naming one that is absent."""
    for key in keys:
        if key not in found:
            raise RemoteError(f"{key} is absent")
    return [found[key] for key in keys]


def map_parts(fields: Mapping[str, Value]) -> list[Buffer]:
    """A map of at most 15 fields in their order, in buffers to send one after the other.

    Bytes and memoryviews go as ``bin`` from where they lie, sequences as arrays.
    """
    parts: list[Buffer] = []
    head = bytearray([0x80 | len(fields)])
    for key, value in fields.items():
        head += pack(key)
        if isinstance(value, bytes | memoryview):
            parts += [bytes(head + _bin_header(len(value))), value]
            head.clear()
        else:
            head += pack(list(value) if isinstance(value, tuple) else value)
    return [*parts, bytes(head)] if head else parts


def variant_parts(name: str, fields: Mapping[str, Value]) -> list[Buffer]:
    """A variant with content, as map_parts."""
    return [b"\x81" + pack(name), *map_parts(fields)]


def _bin_header(length: int) -> bytes:
    for i in range(3):
        if length < 1 << (8 << i):
            return bytes([0xC4 + i]) + length.to_bytes(1 << i, "big")
    raise ValueError(f"{length} bytes in one value")


def check_unsigned(name: str, value: int, bits: int) -> None:
    """Raises ValueError: a number of ours that its field cannot hold."""
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} is {value}, which is not within {bits} bits")
