from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.kwaai_hello import RECEIVED, Hello
from kwaainet_bridge.wire.kwaai_lease import Denial, Denied, Granted, LeaseReply, LeaseRequest


def joined(message) -> bytes:
    return b"".join(message.parts())


# the first two made by the serialiser that KwaaiNet uses
OUTCOMES = [
    (Granted(1, 30), "81a74772616e74656482a86c656173655f696401a874746c5f736563731e"),
    (
        Denied(Denial.AT_CAPACITY, 5),
        "81b044656e6965644174436170616369747981b072657472795f61667465725f7365637305",
    ),
    (Denied(Denial.WRONG_MODEL), msgpack.packb("DeniedWrongModel").hex()),
    (Denied(Denial.LEASE_UNKNOWN), msgpack.packb("DeniedLeaseUnknown").hex()),
    (Denied(Denial.PROTOCOL_UNSUPPORTED), msgpack.packb("DeniedProtocolUnsupported").hex()),
    (
        Granted(2**64 - 1, 2**32 - 1),
        msgpack.packb({"Granted": {"lease_id": 2**64 - 1, "ttl_secs": 2**32 - 1}}).hex(),
    ),
]


@pytest.mark.parametrize(("outcome", "hexed"), OUTCOMES)
def test_outcomes(outcome, hexed):
    assert joined(LeaseReply(outcome)).hex() == hexed
    assert LeaseReply.read(bytes.fromhex(hexed)) == LeaseReply(outcome)


def test_requests():
    for model in (None, "", "llama3.1:8b"):
        packed = msgpack.packb({"model": model})
        assert joined(LeaseRequest(model)) == packed
        assert LeaseRequest.read(packed) == LeaseRequest(model)
    assert LeaseRequest.read(msgpack.packb({})) == LeaseRequest(None)
    assert LeaseRequest.read(msgpack.packb({"who": [1], "model": "m"})) == LeaseRequest("m")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([None], "the request is an array, not a map"),
        ({"model": 5}, "model is an integer, not text"),
        ({"model": b"m"}, "model is bytes, not text"),
        ({"model": "m" * (defaults.MAX_MODEL_NAME_BYTES + 1)}, "model has 1025 bytes, at most 1024"),
        (None, "the request is nil, not a map"),
    ],
)
def test_bad_requests(value, complaint):
    with pytest.raises(RemoteError, match=complaint):
        LeaseRequest.read(msgpack.packb(value))


def test_outcomes_of_other_writers():
    """In another order, with more than this version knows, and a variant without content as a map of nil."""
    later = {"price": None, "ttl_secs": 30, "lease_id": 7}
    assert LeaseReply.read(msgpack.packb({"Granted": later})).outcome == Granted(7, 30)
    assert LeaseReply.read(msgpack.packb({"DeniedWrongModel": None})).outcome == Denied(Denial.WRONG_MODEL)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("Granted", "the outcome is Granted without its content"),
        ("DeniedAtCapacity", "the outcome is DeniedAtCapacity without its content"),
        ("PeerUnreachable", "'PeerUnreachable', which is neither Granted nor a known denial"),
        ({"DeniedByMoon": {"phase": 1}}, "'DeniedByMoon', which is neither"),
        ({"DeniedWrongModel": 1}, "DeniedWrongModel is an integer, not nil"),
        ({"Granted": None}, "Granted is nil, not a map"),
        ({"Granted": [1, 30]}, "Granted is an array, not a map"),
        ({"Granted": {"lease_id": 1}}, "ttl_secs is absent"),
        ({"Granted": {"ttl_secs": 1}}, "lease_id is absent"),
        ({"Granted": {"lease_id": -1, "ttl_secs": 1}}, "lease_id is -1"),
        ({"Granted": {"lease_id": 1, "ttl_secs": 2**32}}, "ttl_secs is 4294967296"),
        ({"DeniedAtCapacity": {}}, "retry_after_secs is absent"),
        ({"DeniedAtCapacity": {"retry_after_secs": 1.5}}, "retry_after_secs is a float"),
        ({"Granted": {"lease_id": 1, "ttl_secs": 1}, "x": 1}, "a map of 2 pairs, not one variant"),
        (5, "the outcome is an integer, not one variant"),
    ],
)
def test_bad_outcomes(value, complaint):
    with pytest.raises(RemoteError, match=complaint):
        LeaseReply.read(msgpack.packb(value))


def test_cut_and_long_outcomes():
    for _, hexed in OUTCOMES:
        data = bytes.fromhex(hexed)
        for end in range(len(data)):
            with pytest.raises(RemoteError):
                LeaseReply.read(data[:end])
        with pytest.raises(RemoteError, match="1 bytes follow"):
            LeaseReply.read(data + b"\xc0")


def test_our_own_mistakes():
    for make in (
        lambda: Granted(2**64, 1),
        lambda: Granted(1, 2**32),
        lambda: Granted(-1, 1),
        lambda: Denied(Denial.AT_CAPACITY, 2**32),
        lambda: Denied(Denial.WRONG_MODEL, 5),
    ):
        with pytest.raises(ValueError):
            make()


outcomes = st.one_of(
    st.builds(Granted, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
    st.builds(Denied, st.just(Denial.AT_CAPACITY), st.integers(0, 2**32 - 1)),
    st.builds(Denied, st.sampled_from(Denial)),
)


@QUICK
@given(outcomes, st.integers(0, 1 << 16), st.integers(0, 255))
def test_round_trips_and_any_bytes(outcome, position, byte):
    packed = joined(LeaseReply(outcome))
    assert LeaseReply.read(packed).outcome == outcome
    assert msgpack.packb(msgpack.unpackb(packed)) == packed
    broken = bytearray(packed)
    broken[position % len(broken)] = byte
    try:
        again = LeaseReply.read(bytes(broken))
    except RemoteError:
        return
    assert LeaseReply.read(joined(again)) == again


# --- hello ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", RECEIVED, "grüß dich 💬", "a\x1b[2J\n\0", "x" * 4096])
def test_hello(text):
    assert joined(Hello(text)) == text.encode()
    assert Hello.read(text.encode()) == Hello.read(memoryview(text.encode())) == Hello(text)


def test_bad_hellos():
    for data in (b"\xff", b"ok\xc3", b"\xed\xa0\x80"):
        with pytest.raises(RemoteError, match="the text is not UTF-8"):
            Hello.read(data)
    with pytest.raises(RemoteError, match="the text has 4097 bytes, at most 4096"):
        Hello.read(b"x" * 4097)
    with pytest.raises(ValueError, match="more than 4096 bytes"):
        Hello("é" * 2049)
