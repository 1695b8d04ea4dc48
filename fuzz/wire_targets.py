"""Varints, framings, envelopes, msgpack and peer ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.circuit import (
    decode_hop,
    decode_punch,
    decode_stop,
    encode_hop,
    encode_punch,
    encode_stop,
)
from kwaainet_bridge.wire.envelope import (
    CALL_ID_BYTES,
    DelimitedDecoder,
    decode_answer,
    decode_call,
    encode_answer,
    encode_call,
    encode_error,
)
from kwaainet_bridge.wire.frames import LENGTH_FIRST, MARKER_FIRST, FrameDecoder, FrameOrder
from kwaainet_bridge.wire.msgpack import pack, unpack
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.prefixed import PrefixedDecoder
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

_MAX_BODY: Final = 1 << 16
_PIECES: Final = (1, 7, 4096)


def expect(condition: bool, what: str) -> None:
    """A fuzzing run must not lose its checks to ``python -O``."""
    if not condition:
        raise AssertionError(what)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def _outcome(decoder: PrefixedDecoder[Any], parts: list[bytes]) -> tuple[list[Any], str | None]:
    messages: list[Any] = []
    try:
        for part in parts:
            messages += decoder.feed(part)
        decoder.finish()
    except RemoteError as e:
        return messages, str(e)
    return messages, None


def same_however_cut(make: Callable[[], PrefixedDecoder[Any]], data: bytes) -> tuple[list[Any], str | None]:
    whole = _outcome(make(), [data])
    for size in _PIECES:
        expect(_outcome(make(), pieces(data, size)) == whole, f"pieces of {size} bytes end otherwise")
    return whole


def varint(data: bytes) -> None:
    parsed = decode_uvarint(data)
    if parsed is not None:
        value, used = parsed
        expect(decode_uvarint(encode_uvarint(value)) == (value, len(encode_uvarint(value))), "round trip")
        expect(used >= len(encode_uvarint(value)), "fewer bytes than the number takes")


def delimited(data: bytes) -> None:
    bodies, error = same_however_cut(lambda: DelimitedDecoder(_MAX_BODY), data)
    again = b"".join(encode_uvarint(len(body)) + body for body in bodies)
    expect(DelimitedDecoder(_MAX_BODY).feed(again) == bodies, "round trip")
    if error is not None:
        raise RemoteError(error)


def _frames(order: FrameOrder, data: bytes) -> None:
    whole, error = same_however_cut(lambda: FrameDecoder(_MAX_BODY, order=order), data)
    again = b"".join(order.encode_header(f.marker, len(f.payload)) + f.payload for f in whole)
    expect(data.startswith(again), "round trip")
    expect(error is not None or again == data, "bytes were lost")
    for frame in whole:
        if frame.marker == frames.END_OR_ERROR:
            expect(isinstance(frame.error_text, str), "an error text that is none")
    if error is not None:
        raise RemoteError(error)


def frames_marker_first(data: bytes) -> None:
    _frames(MARKER_FIRST, data)


def frames_length_first(data: bytes) -> None:
    _frames(LENGTH_FIRST, data)


def call(data: bytes) -> None:
    read = decode_call(data)
    expect(isinstance(read.protocol, str), "a protocol that is no text")
    (body,) = DelimitedDecoder(1 << 24).feed(encode_call(read.call_id, read.peer, read.protocol, read.data))
    expect(decode_call(body) == read, "round trip")
    expect(len(read.call_id) == CALL_ID_BYTES, "call id")


def answer(data: bytes) -> None:
    read = decode_answer(data)
    if read.response is not None:
        wire = encode_answer(read.call_id, read.response)
    else:
        wire = encode_error(read.call_id, str(read.error))
    (body,) = DelimitedDecoder(1 << 24).feed(wire)
    expect(decode_answer(body) == read, "round trip")


def msgpack(data: bytes) -> None:
    value = unpack(data)
    packed = pack(value)
    # a descriptor's size may have come as a list and goes as a tuple, one level deeper
    expect(pack(unpack(packed, max_depth=1000)) == packed, "round trip")


def peer_id(data: bytes) -> None:
    try:
        peer = PeerId(data)
    except RemoteError:
        peer = PeerId.parse(data.decode("utf-8", "replace"))
    expect(PeerId.parse(str(peer)) == peer, "round trip")


def circuit(data: bytes) -> None:
    """Messages of relays and of hole punching, each as any of them."""
    for decode, encode in (
        (decode_hop, encode_hop),
        (decode_stop, encode_stop),
        (decode_punch, lambda read: encode_punch(read.type, read.addresses)),
    ):
        try:
            read = decode(data)
        except RemoteError:
            continue
        (body,) = DelimitedDecoder(1 << 24).feed(encode(read))
        expect(decode(body) == read, "round trip")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "varint": varint,
    "delimited": delimited,
    "frames-marker-first": frames_marker_first,
    "frames-length-first": frames_length_first,
    "call": call,
    "answer": answer,
    "msgpack": msgpack,
    "peer-id": peer_id,
    "circuit": circuit,
}
