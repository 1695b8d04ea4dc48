"""An encoder of /kwaai/tensor/2.0.0 written from docs/protocols/kwaai-tensor.md alone; it uses nothing of the package."""

from __future__ import annotations

import struct


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def content(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def frame(marker: int, payload: bytes) -> bytes:
    return struct.pack(">QB", len(payload), marker) + payload


def offer(  # noqa: PLR0917 - the fields in their order
    no: int,
    name: str,
    dtype: str,
    shape=(),
    compression=0,
    count=0,
    metadata=None,
    data: bytes = b"",
    more=b"",
) -> bytes:
    body = number(1, no) + content(2, name.encode()) + content(3, dtype.encode())
    if shape:
        body += content(4, b"".join(map(varint, shape)))
    body += number(5, compression) + number(6, count)
    for key in sorted(metadata or {}):
        body += content(7, content(1, key.encode()) + content(2, metadata[key].encode()))
    if data:
        body += content(8, data)
    return frame(0, content(1, body + more))


def part(no: int, offset: int, data: bytes) -> bytes:
    return frame(0, content(2, number(1, no) + number(2, offset) + content(3, data)))


def ack(no: int, code: int, text: str = "", count: int = 0) -> bytes:
    body = number(1, no) + number(2, code)
    if text:
        body += content(3, text.encode())
    return frame(0, content(3, body + number(4, count)))


def end(code: int = 0, text: str = "") -> bytes:
    return frame(1, (content(1, text.encode()) if text else b"") + number(2, code))
