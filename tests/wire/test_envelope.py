from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK, cut, cuts, outcome
from wire_golden import FRAMES

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.envelope import (
    Answer,
    Call,
    DelimitedDecoder,
    decode_answer,
    decode_call,
    encode_answer,
    encode_call,
    encode_error,
)
from kwaainet_bridge.wire.varint import encode_uvarint

CALL_ID = bytes(range(16))
PEER = bytes.fromhex("002408011220036dc7dd792a98f2b0c74d8573dc4dc4c0e91a1592ff19844512841cd34b5c48")
PING = bytes.fromhex("12160a1401010101010101010101010101010101010101011801")


def body(wire: bytes) -> bytes:
    (only,) = DelimitedDecoder(4096).feed(wire)
    return only


def test_golden_request():
    wire = FRAMES["unary_request"]
    assert decode_call(body(wire)) == Call(CALL_ID, PEER, "DHTProtocol.rpc_ping", PING)
    assert encode_call(CALL_ID, PEER, "DHTProtocol.rpc_ping", PING) == wire


def test_golden_response():
    wire = FRAMES["unary_response"]
    answer = decode_answer(body(wire))
    assert answer.call_id == CALL_ID
    assert answer.error is None
    assert answer.response.hex() == "12160a14" + "aa" * 20 + "2100002040fc54d9412801"
    assert encode_answer(CALL_ID, answer.response) == wire


def test_golden_error():
    wire = FRAMES["unary_error"]
    assert decode_answer(body(wire)) == Answer(CALL_ID, None, "ValueError('boom')")
    assert encode_error(CALL_ID, "ValueError('boom')") == wire


def test_empty_response_is_a_response():
    wire = encode_answer(CALL_ID, b"")
    assert decode_answer(body(wire)) == Answer(CALL_ID, b"", None)


def test_answer_to_another_call_id_is_accepted_as_stock_does():
    assert decode_answer(body(encode_answer(b"other", b"x"))).call_id == b"other"


def test_error_text_survives_bad_characters():
    assert decode_answer(body(encode_error(CALL_ID, "a\udc80b"))).error == "a\\udc80b"
    raw = bytes.fromhex("0a10") + CALL_ID + bytes.fromhex("2205 1203 61ff62")
    assert decode_answer(raw).error == "ab"


def test_call_ids_have_16_bytes():
    with pytest.raises(ValueError, match="16 bytes"):
        encode_call(b"short", PEER, "p", b"")


ID = "0a10" + CALL_ID.hex()


@pytest.mark.parametrize(
    ("hexed", "field"),
    [
        ("", "call_id"),
        ("ff", "does not decode"),
        (ID, "call is absent"),
        (ID + "2204 0a02082b", "call is absent"),
        ("0a0101" + "1a06 0a00 1200 1a00", "call_id has 1 bytes"),
        ("1a06 0a00 1200 1a00", "call_id"),
        (ID + "1a04 1200 1a00", "call.peer"),
        (ID + "1a04 0a00 1a00", "call.proto"),
        (ID + "1a04 0a00 1200", "call.data"),
        (ID + "1a07 0a00 1201ff 1a00", "call.proto is not UTF-8"),
    ],
)
def test_bad_request(hexed, field):
    with pytest.raises(RemoteError, match=field):
        decode_call(bytes.fromhex(hexed))


@pytest.mark.parametrize(
    ("hexed", "field"),
    [
        ("", "call_id"),
        ("0a", "does not decode"),
        (ID, "answer is absent"),
        (ID + "2a00", "answer is absent"),
        (ID + "1a06 0a00 1200 1a00", "answer is absent"),
        (ID + "2200", "neither response nor error"),
    ],
)
def test_bad_answer(hexed, field):
    with pytest.raises(RemoteError, match=field):
        decode_answer(bytes.fromhex(hexed))


def test_nested_groups_are_refused():
    with pytest.raises(RemoteError, match="does not decode"):
        decode_call(b"\x3b" * 10_000)


def test_delimited_limit_is_on_the_body():
    assert DelimitedDecoder(300).feed(encode_uvarint(300) + bytes(300)) == [bytes(300)]
    with pytest.raises(RemoteError, match="301 bytes announced, at most 300"):
        DelimitedDecoder(300).feed(encode_uvarint(301))
    with pytest.raises(RemoteError, match="announced"):
        DelimitedDecoder(300).feed(b"\xff" * 9 + b"\x01")
    with pytest.raises(RemoteError, match="varint"):
        DelimitedDecoder(300).feed(b"\xff" * 10)


def test_delimited_cut():
    decoder = DelimitedDecoder(300)
    decoder.finish()
    decoder.feed(b"\xac")
    with pytest.raises(RemoteError, match="1 bytes of its header"):
        decoder.finish()
    assert decoder.feed(b"\x02abc") == []
    with pytest.raises(RemoteError, match="3 of 300"):
        decoder.finish()


@QUICK
@given(st.lists(st.binary(max_size=200), max_size=8), st.binary(max_size=12), cuts)
def test_any_bytes_end_the_same_however_cut(bodies, junk, positions):
    data = b"".join(encode_uvarint(len(b)) + b for b in bodies) + junk
    whole = outcome(DelimitedDecoder(200), [data])
    assert whole[0][: len(bodies)] == bodies
    assert outcome(DelimitedDecoder(200), cut(data, positions)) == whole


@QUICK
@given(st.binary(max_size=60), st.booleans())
def test_any_envelope_decodes_or_raises_remote_error(junk, with_id):
    data = bytes.fromhex(ID) + junk if with_id else junk
    for decode in (decode_call, decode_answer):
        try:
            decode(data)
        except RemoteError as e:
            assert "unary" in str(e)  # noqa: PT017 - not raising is fine too


@QUICK
@given(st.binary(max_size=40), st.text(max_size=20), st.binary(max_size=60))
def test_call_round_trip(peer, protocol, data):
    assert decode_call(body(encode_call(CALL_ID, peer, protocol, data))) == Call(
        CALL_ID, peer, protocol, data
    )
