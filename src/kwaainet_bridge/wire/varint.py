"""Unsigned LEB128, the length prefix of unary messages and of Kademlia."""

from __future__ import annotations

from kwaainet_bridge.errors import RemoteError

MAX_UVARINT_BYTES = 10
"""A 64-bit value takes at most this many bytes."""

_MAX_VALUE = (1 << 64) - 1


def encode_uvarint(n: int) -> bytes:
    """Encode ``0 <= n < 2**64`` in as few bytes as it takes. Raises ValueError outside that range."""
    if 0 <= n < 0x80:
        return n.to_bytes()
    if not 0 <= n <= _MAX_VALUE:
        raise ValueError(f"{n} is not an unsigned 64-bit number")
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def decode_uvarint(
    buf: bytes | bytearray | memoryview, offset: int = 0, *, max_bytes: int = MAX_UVARINT_BYTES
) -> tuple[int, int] | None:
    """Read the number at ``offset``: its value and the offset behind it, or None if ``buf`` ends within it.

    Padded forms (``80 00`` for zero) are accepted, as Go's encoding/binary does for stock daemons. Raises
    RemoteError if the number does not end within ``max_bytes`` bytes or does not fit in 64 bits.
    """
    value = shift = 0
    try:
        while (byte := buf[offset]) >= 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            offset += 1
            if shift == 7 * max_bytes:
                raise RemoteError(f"varint: does not end within {max_bytes} bytes")
    except IndexError:
        return None
    value |= byte << shift
    if value > _MAX_VALUE:
        raise RemoteError("varint: more than 64 bits")
    return value, offset + 1
