from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

KNOWN = [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**64 - 1, "ff" * 9 + "01")]


@pytest.mark.parametrize(("value", "encoded"), KNOWN)
def test_known_values(value, encoded):
    assert encode_uvarint(value).hex() == encoded
    assert decode_uvarint(bytes.fromhex(encoded)) == (value, len(encoded) // 2)


def test_offset_and_what_follows():
    assert decode_uvarint(b"\xff\xac\x02\x99", 1) == (300, 3)
    assert decode_uvarint(memoryview(b"\xac\x02")) == (300, 2)


@pytest.mark.parametrize("encoded", [b"", b"\x80", b"\xff" * 9])
def test_incomplete(encoded):
    assert decode_uvarint(encoded) is None
    assert decode_uvarint(b"abc" + encoded, 3) is None


def test_padded_zero_is_zero_as_in_go():
    assert decode_uvarint(b"\x80\x00") == (0, 2)


@pytest.mark.parametrize(
    ("encoded", "complaint"),
    [
        (b"\x80" * 10, "does not end within 10 bytes"),
        (b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\xff" * 50, "does not end within 10 bytes"),
    ],
)
def test_overlong(encoded, complaint):
    with pytest.raises(RemoteError, match=complaint):
        decode_uvarint(encoded)


def test_shorter_limit():
    with pytest.raises(RemoteError, match="within 2 bytes"):
        decode_uvarint(b"\x80\x80\x01", max_bytes=2)
    assert decode_uvarint(b"\x80\x01", max_bytes=2) == (128, 2)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_out_of_range(value):
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        encode_uvarint(value)


@QUICK
@given(st.integers(0, 2**64 - 1), st.binary(max_size=4))
def test_round_trip(value, tail):
    encoded = encode_uvarint(value)
    assert decode_uvarint(encoded + tail) == (value, len(encoded))
    assert all(decode_uvarint(encoded[:n]) is None for n in range(len(encoded)))
