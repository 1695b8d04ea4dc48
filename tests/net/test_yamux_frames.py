"""The frame parser, cut in every possible way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net.yamux_frames import (
    DATA,
    FIN,
    PING,
    SYN,
    WINDOW_UPDATE,
    FrameParser,
    Header,
    Payload,
    encode_header,
)

# The first frames of a session, as go-yamux and p2pd 0.5.0.hivemind1 write them: SYN with a window update, then
# data, then a ping.
SESSION = (
    bytes.fromhex("00 01 0001 00000001 00000000")
    + bytes.fromhex("00 00 0004 00000001 00000005") + b"hello"
    + bytes.fromhex("00 02 0001 00000000 00000007")
)  # fmt: skip


def outcome(pieces: list[bytes]) -> tuple[list[Header], bytes, str]:
    """The headers, the payload, and the text of the error that ends them, if one does."""
    parser = FrameParser()
    headers, payload = [], b""
    try:
        for piece in pieces:
            for event in parser.feed(piece):
                if isinstance(event, Payload):
                    payload += event.data
                else:
                    headers.append(event)
    except RemoteError as e:
        return headers, payload, str(e)
    return headers, payload, ""


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    edges = sorted({0, *(min(p, len(data)) for p in positions), len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


EXPECTED = [Header(WINDOW_UPDATE, SYN, 1, 0), Header(DATA, FIN, 1, 5), Header(PING, SYN, 0, 7)]


def test_whole() -> None:
    assert outcome([SESSION]) == (EXPECTED, b"hello", "")


@given(st.lists(st.integers(0, len(SESSION)), max_size=20))
def test_in_pieces(cuts: list[int]) -> None:
    assert outcome(cut(SESSION, cuts)) == (EXPECTED, b"hello", "")


def test_encoding() -> None:
    assert encode_header(WINDOW_UPDATE, SYN, 1, 0) == SESSION[:12]


def test_payload_tells_what_remains() -> None:
    parser = FrameParser()
    assert list(parser.feed(encode_header(DATA, 0, 1, 5))) == [Header(DATA, 0, 1, 5)]
    assert list(parser.feed(b"he")) == [Payload(b"he", 3)]
    assert list(parser.feed(b"llo")) == [Payload(b"llo", 0)]


@given(st.binary(max_size=200), st.lists(st.integers(0, 250), max_size=20))
def test_any_bytes_end_the_same_however_cut(junk: bytes, cuts: list[int]) -> None:
    data = SESSION + junk
    whole = outcome([data])
    assert whole[0][: len(EXPECTED)] == EXPECTED
    assert outcome(cut(data, cuts)) == whole


@pytest.mark.parametrize(
    ("frame", "text"), [(b"\x01" + bytes(11), "version 1"), (b"\x00\x09" + bytes(10), "type 9")]
)
def test_unknown(frame: bytes, text: str) -> None:
    with pytest.raises(RemoteError, match=text):
        list(FrameParser().feed(frame))


def test_frames_before_bad_bytes_are_delivered_first() -> None:
    assert outcome([SESSION + b"\x01" * 12]) == (EXPECTED, b"hello", "yamux: version 1")
