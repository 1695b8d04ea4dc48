"""An encoder and a reader of /kwaai/avg/1.0.0 written from docs/protocols/kwaai-avg.md alone: nothing of the package."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

NAME = "/kwaai/avg/1.0.0/"

# --- protobuf and frames


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
    return varint(field << 3 | 2) + varint(len(value)) + value if value else b""


def double(field: int, value: float) -> bytes:
    return varint(field << 3 | 1) + struct.pack("<d", value) if value else b""


def frame(payload: bytes, marker: int = 0) -> bytes:
    return struct.pack(">QB", len(payload), marker) + payload


END = frame(b"", 1)


def error(text: str) -> bytes:
    return frame(content(1, text.encode()), 1)


def fields(payload: bytes) -> dict[int, list]:
    """Every field's values, in order; wire types 0, 1 and 2."""
    found: dict[int, list] = {}
    at = 0

    def take_varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = payload[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(payload):
        tag = take_varint()
        if tag & 7 == 0:
            value: object = take_varint()
        elif tag & 7 == 1:
            (value,) = struct.unpack_from("<d", payload, at)
            at += 8
        else:
            assert tag & 7 == 2
            length = take_varint()
            value = payload[at : at + length]
            at += length
        found.setdefault(tag >> 3, []).append(value)
    assert at == len(payload)
    return found


# --- messages


def nil_gather() -> bytes:
    """No bandwidth, mode 0, nothing for the applications."""
    return b"\x93" + b"\xc0" + b"\x00" + b"\xc4\x01" + b"\xc0"


def schema(lines: list[str], compression: int, part_bytes: int) -> bytes:
    text = "".join(f"{line}\n" for line in [*lines, f"compression={compression}", f"part_bytes={part_bytes}"])
    return hashlib.sha256(text.encode()).digest()


def join(
    schema_hash: bytes, expiration: float, gather: bytes, group_key: str, *, client_mode: bool = False
) -> bytes:
    body = content(2, schema_hash) + double(3, expiration) + content(4, gather)
    return frame(body + number(5, client_mode) + content(6, group_key.encode()))


def from_leader(
    code: int, group_id: bytes = b"", suggested: bytes = b"", members: tuple = (), gathered: tuple = ()
) -> bytes:
    body = number(1, code) + content(2, group_id) + content(3, suggested)
    body += b"".join(content(4, member) for member in members)
    return frame(body + b"".join(content(5, each) for each in gathered))


def tensor(
    buffer: bytes, size: tuple[int, ...] = (), dtype: str = "", compression: int = 0, chunks: int = 0
) -> bytes:
    body = content(1, buffer) + content(2, b"".join(map(varint, size))) + content(4, dtype.encode())
    return body + number(5, compression) + number(6, chunks)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def averaging(code: int = 0, group_id: bytes = b"", part: bytes = b"", weight: float = 0.0) -> bytes:
    return frame(number(1, code) + content(2, group_id) + content(4, part) + double(5, weight))


def state_piece(part: bytes, metadata: bytes = b"") -> bytes:
    return frame(content(1, metadata) + content(2, part))


# --- rules


def scores(bandwidths: list[float | None]) -> list[Fraction]:
    """In exact numbers."""
    given = [Fraction(b) for b in bandwidths if b]
    if not given:
        return [Fraction(b is None) for b in bandwidths]
    mean = sum(given) / len(given)
    each = [mean if b is None else Fraction(b) for b in bandwidths]
    if len(each) == 2:
        return [Fraction(b > 0) for b in each]
    falling = sorted(each, reverse=True)
    times = [Fraction(len(each) - 2 + k, 1) / sum(falling[:k]) for k in range(1, len(each) + 1)]
    k = 1
    while k < len(each) and times[k] * falling[k] > 1:
        k += 1
    return [max(Fraction(0), times[k - 1] * b - 1) for b in each]


def shares(total: int, bandwidths: list[float | None]) -> list[int]:
    of_each = scores(bandwidths)
    result = [math.floor(total * score / sum(of_each)) for score in of_each]
    while sum(result) < total:
        quotients = [score / (share + 1) for score, share in zip(of_each, result, strict=True)]
        result[quotients.index(max(quotients))] += 1
    return result


def next_bits(bits: str, group_id: bytes, place: int, size: int, target: int | None) -> str:
    if not bits:
        return bits
    count = target or 1
    while target is None and count < size:
        count *= 2
    order = sorted(range(count), key=lambda n: hashlib.sha256(group_id + struct.pack(">I", n)).hexdigest())
    digits = math.ceil(math.log2(count))
    return (bits + f"{order[place]:0{digits}b}")[-len(bits) :]


def parts_of(share: list[int], lengths: list[int], elements: int) -> list[list[tuple[int, int, int]]]:
    """For each member its parts as (tensor, start, length): the page's pseudocode."""
    total = sum(lengths)
    end = [math.trunc(sum(share[: i + 1]) / total * total) for i in range(len(share))]
    end[-1] = total
    mine: list[list[tuple[int, int, int]]] = [[] for _ in share]
    m = at = 0
    for which, size in enumerate(lengths):
        for start in range(0, max(size, 1), elements):
            length = min(elements, size - start)
            first, overlap = m, [end[m] - at]
            while at + length > end[m]:
                m += 1
                overlap.append(min(at + length, end[m]) - end[m - 1])
            owner = m if m == first else first + overlap.index(max(overlap))
            mine[owner].append((which, start, length))
            at += length
    return mine


# --- a peer


class Frames:
    """Frames of one side of a stream; the stream only reads and writes bytes."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def next(self) -> tuple[int, dict[int, list]] | None:
        """Marker and fields, or None at the end."""
        while len(self._buffer) < 9 or len(self._buffer) < 9 + struct.unpack(">Q", self._buffer[:8])[0]:
            data = await self.stream.read(1 << 16)
            if not data:
                assert not self._buffer
                return None
            self._buffer += data
        length, marker = struct.unpack(">QB", self._buffer[:9])
        payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
        return marker, fields(payload)


class Member:
    """A member of a group of two with equal shares, no compression, and one float32 tensor; no clock, no patience."""

    def __init__(self, host, prefix: str, values: list[float], weight: float, part_bytes: int) -> None:
        self.values = list(values)
        self.host = host
        self.name = NAME + prefix
        self.weight = weight
        self.part_bytes = part_bytes
        self.given: list[bytes] = []  # what the other gathered
        self._schema = schema([f"float32[{len(values)}]"], 0, part_bytes)

    def served(self) -> None:
        """Serve the parts call; it answers as soon as a part comes, with its own values of then."""
        self._before = list(self.values)
        self.host.serve(f"{self.name}/parts", self._serve)

    async def follow(self, leader, expiration: float) -> None:
        stream = await self.host.open_stream(leader, f"{self.name}/join")
        await stream.write(join(self._schema, expiration, nil_gather(), f"{self.name}.0b") + END)
        incoming = Frames(stream)
        assert await incoming.next() == (0, {1: [2]})
        marker, group = await incoming.next()
        assert (marker, group[1]) == (0, [3])
        assert await incoming.next() is None
        await stream.close()
        self.given = group[5]
        await self._average(leader, group[2][0], group[4])

    async def lead(self, stream) -> None:
        """Serve one follower's call to join, and average with it."""
        incoming = Frames(stream)
        marker, request = await incoming.next()
        assert (marker, request[2], request[6]) == (0, [self._schema], [f"{self.name}.0b".encode()])
        assert await incoming.next() == (1, {})
        await stream.write(from_leader(2))
        self.given = [nil_gather(), *request[4]]
        members = (self.host.peer_id.raw, stream.remote.raw)
        await stream.write(from_leader(3, b"group", members=members, gathered=tuple(self.given)))
        await stream.close()
        await self._average(stream.remote, b"group", members)

    async def _average(self, peer, group_id: bytes, members) -> None:
        self.group_id = group_id
        split = shares(len(self.values), [None, None])
        mine = parts_of(split, [len(self.values)], self.part_bytes // 4)
        place = members.index(self.host.peer_id.raw)
        self.mine, theirs = mine[place], mine[1 - place]
        self.ready.set()
        await self._exchange(peer, theirs)

    ready = None  # an event, set by the test

    async def _exchange(self, peer, parts: list[tuple[int, int, int]]) -> None:
        stream = await self.host.open_stream(peer, f"{self.name}/parts")
        first = (4, self.group_id)
        for _, start, length in parts:
            values = floats(*self._before[start : start + length])
            await stream.write(averaging(*first, tensor(values, (length,), "float32"), self.weight))
            first = (0, b"")
        await stream.write(END)
        incoming = Frames(stream)
        for _, start, length in parts:
            marker, answer = await incoming.next()
            assert (marker, answer[1]) == (0, [5])
            part = fields(answer[4][0])
            assert (part[2], part[4]) == ([varint(length)], [b"float32"])
            for i, delta in enumerate(struct.unpack(f"<{length}f", part[1][0])):
                self.values[start + i] += delta
        assert await incoming.next() is None
        await stream.close()

    async def _serve(self, stream) -> None:
        incoming = Frames(stream)
        await self.ready.wait()
        for number_of, (_, start, length) in enumerate(self.mine):
            marker, message = await incoming.next()
            assert marker == 0
            assert message.get(1, [0]) == [0 if number_of else 4]
            assert message.get(2, [self.group_id]) == [self.group_id]
            (weight,) = message[5]
            theirs = struct.unpack(f"<{length}f", fields(message[4][0])[1][0])
            ours = self._before[start : start + length]
            average = [
                (weight * a + self.weight * b) / (weight + self.weight)
                for a, b in zip(theirs, ours, strict=True)
            ]
            self.values[start : start + length] = average
            deltas = floats(*(mean - a for mean, a in zip(average, theirs, strict=True)))
            await stream.write(averaging(5, part=tensor(deltas, (length,), "float32")))
        assert await incoming.next() == (1, {})
        await stream.close()
