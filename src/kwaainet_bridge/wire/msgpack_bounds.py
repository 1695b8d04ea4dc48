"""A look over msgpack bytes before they become objects.

The msgpack library trusts announced counts up to its limits and allocates a list as soon as it is announced,
so a few kilobytes of nested array headers can ask for gigabytes; and each extension value makes it call back
into Python, so nesting can exhaust the stack. This pass allocates nothing but the stack of open containers.
"""

from __future__ import annotations

from typing import Final

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import Buffer

# What the first byte of a value says: the value's whole length, where that is fixed ...
_LENGTH: Final = {
    **dict.fromkeys([*range(0x80), *range(0xE0, 0x100)], 1),  # small integers
    **dict.fromkeys([0xC0, 0xC2, 0xC3], 1),  # nil, false, true
    **{0xA0 + n: 1 + n for n in range(32)},  # short strings
    0xCC: 2,
    0xCD: 3,
    0xCE: 5,
    0xCF: 9,
    0xD0: 2,
    0xD1: 3,
    0xD2: 5,
    0xD3: 9,  # integers
    0xCA: 5,
    0xCB: 9,  # floats
}
# ... or how many bytes give the length of a string, or the number of items in an array or of pairs in a map
_STRING_PREFIX: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAY_PREFIX: Final = {0xDC: 2, 0xDD: 4}
_MAP_PREFIX: Final = {0xDE: 2, 0xDF: 4}
_EXT_PREFIX: Final = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_EXT_LENGTH: Final = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

_COPIES: Final = 8
_FREE_COPIES_BYTES: Final = 64 * 1024


def check_bounds(
    data: bytes, *, nested_ext: frozenset[int], max_depth: int, max_items: int, name: str
) -> None:
    """Check that ``data`` is exactly one msgpack value of bounded size and depth.

    Raises RemoteError that begins with ``name``. See value_end.
    """
    end, _ = value_end(data, 0, nested_ext=nested_ext, max_depth=max_depth, max_items=max_items, name=name)
    if end != len(data):
        raise RemoteError(f"{name}: {len(data) - end} bytes follow the value")


def value_end(
    data: Buffer, at: int, *, nested_ext: frozenset[int], max_depth: int, max_items: int, name: str
) -> tuple[int, int]:
    """Where the msgpack value at ``at`` ends, and how many items its containers have, without making objects.

    Containers and the extension types in ``nested_ext``, whose payload is one msgpack value, count as one
    level each; a scalar has depth 0. Items are counted over all containers, a map's pair as two. Raises
    RemoteError that begins with ``name``. It does not look into strings, nor into other extension types.

    The library hands an extension's payload over as a copy, so that a long value within many extensions would
    be held once for each: all payloads together may have 8 times the length of ``data``, or 64 KiB.
    """
    end = len(data)
    items = 0
    copies = 0
    max_copies = max(_COPIES * end, _FREE_COPIES_BYTES)
    missing = 1  # values of the open container that are still to come
    limit = end  # where the innermost open extension ends, and with it all within
    enclosing: list[tuple[int, int, bool]] = []  # (missing, limit) around it, and whether it is an extension
    while True:
        while missing == 0:
            if not enclosing:
                return at, items
            missing, outer_limit, is_extension = enclosing.pop()
            if is_extension and at != limit:
                raise RemoteError(f"{name}: {limit - at} bytes follow the value in an extension")
            limit = outer_limit
        if at >= limit:
            raise RemoteError(f"{name}: cut short at byte {at}")
        missing -= 1
        first = data[at]
        length = _LENGTH.get(first)
        if length is not None:
            at += length
        elif first in _STRING_PREFIX:
            prefix = _STRING_PREFIX[first]
            at += 1 + prefix + int.from_bytes(data[at + 1 : at + 1 + prefix], "big")
        elif first in _EXT_LENGTH or first in _EXT_PREFIX:
            prefix = _EXT_PREFIX.get(first, 0)
            size = _EXT_LENGTH.get(first) or int.from_bytes(data[at + 1 : at + 1 + prefix], "big")
            code_at = at + 1 + prefix
            payload_at = code_at + 1
            if payload_at + size > limit:
                raise RemoteError(f"{name}: cut short in the extension at byte {at}")
            if data[code_at] in nested_ext:
                copies += size
                if copies > max_copies:
                    raise RemoteError(f"{name}: extensions in extensions make {copies} bytes of {end}")
                enclosing.append((missing, limit, True))
                missing, limit, at = 1, payload_at + size, payload_at
            else:
                at = payload_at + size
        else:
            count, at = _container(data, at, first, name)
            if count > max(limit - at, 0):
                raise RemoteError(f"{name}: a container announces {count} items in {limit - at} bytes")
            items += count
            if items > max_items:
                raise RemoteError(f"{name}: more than {max_items} items")
            enclosing.append((missing, limit, False))
            missing = count
        if at > limit:
            raise RemoteError(f"{name}: cut short at byte {limit}")
        if len(enclosing) > max_depth:
            raise RemoteError(f"{name}: nested more than {max_depth} deep")


def _container(data: Buffer, at: int, first: int, name: str) -> tuple[int, int]:
    """How many values the array or map at ``at`` announces, and where the first of them is."""
    if 0x80 <= first <= 0x8F:
        return 2 * (first & 0x0F), at + 1
    if 0x90 <= first <= 0x9F:
        return first & 0x0F, at + 1
    is_map = first in _MAP_PREFIX
    prefix = _MAP_PREFIX[first] if is_map else _ARRAY_PREFIX.get(first, 0)
    if not prefix:
        raise RemoteError(f"{name}: byte {at} is {first:#x}, which msgpack never uses")
    count = int.from_bytes(data[at + 1 : at + 1 + prefix], "big")
    return (2 * count if is_map else count), at + 1 + prefix
