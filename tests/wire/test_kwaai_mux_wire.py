from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK, cut, cuts, outcome

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.kwaai_lease import Denial, Denied, Granted
from kwaainet_bridge.wire.kwaai_mux import (
    MuxDecoder,
    MuxLeaseKeepalive,
    MuxLeaseRelease,
    MuxLeaseRequest,
    MuxLeaseResponse,
    MuxRequest,
    MuxResponse,
    MuxUnknown,
    encode_frame,
    message_parts,
    read_message,
)

BODY = b'{"model": "m"}\x00\xcc\xff'
REQUEST = {"request_id": 7, "method": "POST", "path": "/v1/chat/completions", "body": BODY, "lease_id": None}
RESPONSE = {"request_id": 7, "status": 200, "body": BODY}

MESSAGES = [
    (
        MuxRequest(request_id=7, method="POST", path="/v1/chat/completions", body=BODY),
        {"Request": REQUEST},
    ),
    (
        MuxRequest(request_id=2**64 - 1, method="GET", path="/v1/models", body=b"", lease_id=2**64 - 1),
        {
            "Request": {
                "request_id": 2**64 - 1,
                "method": "GET",
                "path": "/v1/models",
                "body": b"",
                "lease_id": 2**64 - 1,
            }
        },
    ),
    (MuxResponse(request_id=7, status=200, body=BODY), {"Response": RESPONSE}),
    (MuxLeaseRequest(request_id=1), {"LeaseRequest": {"request_id": 1, "model": None}}),
    (MuxLeaseRequest(request_id=1, model="m"), {"LeaseRequest": {"request_id": 1, "model": "m"}}),
    (
        MuxLeaseResponse(request_id=1, outcome=Granted(1, 30)),
        {"LeaseResponse": {"request_id": 1, "outcome": {"Granted": {"lease_id": 1, "ttl_secs": 30}}}},
    ),
    (
        MuxLeaseResponse(request_id=1, outcome=Denied(Denial.LEASE_UNKNOWN)),
        {"LeaseResponse": {"request_id": 1, "outcome": "DeniedLeaseUnknown"}},
    ),
    (MuxLeaseRelease(lease_id=3), {"LeaseRelease": {"lease_id": 3}}),
    (MuxLeaseKeepalive(lease_id=3), {"LeaseKeepalive": {"lease_id": 3}}),
]


def as_integers(value):
    if isinstance(value, bytes):
        return list(value)
    return {k: as_integers(v) for k, v in value.items()} if isinstance(value, dict) else value


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(("message", "value"), MESSAGES)
def test_messages(message, value):
    packed = msgpack.packb(value)
    assert b"".join(message_parts(message)) == packed
    assert encode_frame(message) == framed(packed)
    rust = msgpack.packb(as_integers(value))
    assert read_message(packed) == read_message(rust) == message
    for end in range(len(rust)):
        with pytest.raises(RemoteError):
            read_message(rust[:end])


def test_golden_frame():
    """A keepalive by hand: length, map of one, the variant's name, map of one, the field, the number."""
    frame = (
        bytes.fromhex("1b000000 81 ae") + b"LeaseKeepalive" + bytes.fromhex("81 a8") + b"lease_id" + b"\x05"
    )
    assert encode_frame(MuxLeaseKeepalive(lease_id=5)) == frame
    assert MuxDecoder().feed(frame) == [MuxLeaseKeepalive(lease_id=5)]


def test_keys_of_other_versions():
    older = {k: v for k, v in REQUEST.items() if k != "lease_id"}
    assert read_message(msgpack.packb({"Request": older})) == MESSAGES[0][0]
    later = {"claim": {"signature": [1] * 64}, **dict(reversed(RESPONSE.items()))}
    assert read_message(msgpack.packb({"Response": later})) == MESSAGES[2][0]
    assert read_message(msgpack.packb({"LeaseRequest": {"request_id": 1}})) == MuxLeaseRequest(request_id=1)


def test_unknown_messages_do_not_end_the_stream():
    decoder = MuxDecoder()
    stream = framed(msgpack.packb({"Quote": {"price": [1, 2]}})) + framed(msgpack.packb("Goodbye"))
    got = decoder.feed(stream + encode_frame(MESSAGES[0][0]))
    assert got == [MuxUnknown("Quote"), MuxUnknown("Goodbye"), MESSAGES[0][0]]
    decoder.finish()


BAD_FIELDS = [
    ("Request", "request_id", -1, "request_id is -1"),
    ("Request", "request_id", "7", "request_id is text"),
    ("Request", "method", "x" * 33, "method has 33 bytes, at most 32"),
    ("Request", "method", b"GET", "method is bytes, not text"),
    ("Request", "path", "/" * 8193, "path has 8193 bytes, at most 8192"),
    ("Request", "path", None, "path is nil, not text"),
    ("Request", "body", "text", "body is text, neither bytes"),
    ("Request", "body", [300], "body: item 0 begins with 0xcd"),
    ("Request", "lease_id", 1.5, "lease_id is a float"),
    ("Response", "status", 65536, "status is 65536, which is not within 16 bits"),
    ("Response", "status", None, "status is nil"),
    ("LeaseRequest", "model", 5, "model is an integer, not text"),
    ("LeaseRequest", "model", "m" * 1025, "model has 1025 bytes"),
    ("LeaseResponse", "outcome", "Perhaps", "outcome is 'Perhaps', which is neither"),
    ("LeaseResponse", "outcome", {"Granted": {}}, "lease_id is absent"),
    ("LeaseRelease", "lease_id", None, "lease_id is nil"),
    ("LeaseKeepalive", "lease_id", 2**63 * -1, "lease_id is -9223372036854775808"),
]
BY_NAME = {name: fields for _, value in MESSAGES for name, fields in value.items()} | {"Request": REQUEST}


@pytest.mark.parametrize(("name", "field", "bad", "complaint"), BAD_FIELDS)
def test_bad_fields(name, field, bad, complaint):
    with pytest.raises(RemoteError, match=complaint):
        read_message(msgpack.packb({name: BY_NAME[name] | {field: bad}}))


@pytest.mark.parametrize("name", BY_NAME)
def test_absent_fields_and_content(name):
    for field in set(BY_NAME[name]) - {"lease_id" if name == "Request" else "", "model"}:
        without = {k: v for k, v in BY_NAME[name].items() if k != field}
        with pytest.raises(RemoteError, match=f"{field} is absent"):
            read_message(msgpack.packb({name: without}))
    with pytest.raises(RemoteError, match=f"{name} without its content"):
        read_message(msgpack.packb(name))
    with pytest.raises(RemoteError, match=f"{name} is nil, not a map"):
        read_message(msgpack.packb({name: None}))
    with pytest.raises(RemoteError, match="bytes follow"):
        read_message(msgpack.packb({name: BY_NAME[name]}) + b"\x01")


@pytest.mark.parametrize("value", [5, [1], {}, {"a": 1, "b": 2}, None, {5: 1}])
def test_what_is_no_variant(value):
    with pytest.raises(RemoteError, match=r"the message is|integer, not text"):
        read_message(msgpack.packb(value))


def test_lengths_are_refused_before_the_frame():
    decoder = MuxDecoder()
    with pytest.raises(RemoteError, match="67108865 bytes announced, at most 67108864"):
        decoder.feed((defaults.MAX_MUX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(RemoteError, match="announced"):
        decoder.feed(encode_frame(MESSAGES[0][0]))
    lower = MuxDecoder(100)
    message = MuxResponse(request_id=1, status=200, body=bytes(100))
    with pytest.raises(RemoteError, match="at most 100 are accepted"):
        lower.feed(encode_frame(message))
    with pytest.raises(ValueError, match="at most 100 may be sent"):
        encode_frame(message, max_bytes=100)
    waiting = MuxDecoder()
    waiting.feed((1 << 26).to_bytes(4, "little") + b"x" * 10)
    assert waiting._arrived == 10
    with pytest.raises(RemoteError, match="cut after 10 of 67108864 bytes"):
        waiting.finish()


def test_a_bad_message_comes_after_the_good_ones():
    good, bad = encode_frame(MESSAGES[0][0]), framed(b"\xc1")
    decoder = MuxDecoder()
    assert decoder.feed(good + bad + good) == [MESSAGES[0][0]]
    for _ in range(2):
        with pytest.raises(RemoteError, match="the message is a byte that msgpack never uses"):
            decoder.feed(good)
    with pytest.raises(RemoteError, match="the message ends early"):
        MuxDecoder().feed(bytes(4))


def test_bodies_are_not_copied_again():
    parts = message_parts(MuxRequest(request_id=1, method="POST", path="/", body=memoryview(BODY)))
    assert any(part.obj is BODY for part in parts if isinstance(part, memoryview))
    packed = msgpack.packb({"Request": REQUEST})
    assert read_message(packed).body.obj is packed


def test_our_own_mistakes():
    for make in (
        lambda: MuxRequest(request_id=2**64, method="GET", path="/"),
        lambda: MuxRequest(request_id=1, method="GET", path="/", lease_id=-1),
        lambda: MuxResponse(request_id=1, status=65536),
        lambda: MuxLeaseRequest(request_id=-1),
        lambda: MuxLeaseResponse(request_id=-1, outcome=Granted(1, 1)),
        lambda: MuxLeaseRelease(lease_id=2**64),
        lambda: MuxLeaseKeepalive(lease_id=-1),
    ):
        with pytest.raises(ValueError, match="not within"):
            make()


u64 = st.integers(0, 2**64 - 1)
short = st.text(max_size=8)
messages = st.one_of(
    st.builds(
        MuxRequest,
        request_id=u64,
        method=short,
        path=st.text(max_size=60),
        body=st.binary(max_size=300),
        lease_id=st.none() | u64,
    ),
    st.builds(MuxResponse, request_id=u64, status=st.integers(0, 65535), body=st.binary(max_size=300)),
    st.builds(MuxLeaseRequest, request_id=u64, model=st.none() | short),
    st.builds(
        MuxLeaseResponse,
        request_id=u64,
        outcome=st.builds(Granted, u64, st.integers(0, 2**32 - 1))
        | st.builds(Denied, st.sampled_from(Denial)),
    ),
    st.builds(MuxLeaseRelease, lease_id=u64),
    st.builds(MuxLeaseKeepalive, lease_id=u64),
)


@QUICK
@given(st.lists(messages, max_size=6), cuts)
def test_any_cut_gives_the_same_messages(sent, positions):
    stream = b"".join(map(encode_frame, sent))
    assert outcome(MuxDecoder(), cut(stream, positions)) == (sent, None)


@QUICK
@given(st.lists(messages, max_size=3), st.integers(0, 1 << 16), st.integers(0, 255), cuts)
def test_any_bytes_end_the_same_however_cut(sent, position, byte, positions):
    stream = bytearray(b"".join(map(encode_frame, sent)) + b"\x05\x00")
    stream[position % len(stream)] = byte
    whole = outcome(MuxDecoder(5000), [bytes(stream)])
    assert outcome(MuxDecoder(5000), cut(bytes(stream), positions)) == whole
    assert outcome(MuxDecoder(5000), [stream[i : i + 1] for i in range(len(stream))]) == whole
