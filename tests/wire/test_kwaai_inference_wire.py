from __future__ import annotations

import struct

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire import envelope
from kwaainet_bridge.wire.kwaai_inference import (
    PROTOCOL,
    WARMING_UP,
    InferenceRequest,
    InferenceResponse,
    PayloadType,
    ResponseType,
)

# what a KwaaiNet client sends, made by the serialiser that it uses
GOLDEN = bytes.fromhex(
    "85aa73657373696f6e5f6964cd3039a77365715f706f7300ac7061796c6f61645f74797065a9746f6b656e5f696473a5736861706591"
    "04a464617461dc0010010000002a000000cce7030000007d0000"
)
IDS = [1, 42, 999, 32000]

REQUEST = {
    "session_id": 12345,
    "seq_pos": 0,
    "payload_type": "token_ids",
    "shape": [4],
    "data": struct.pack("<4I", *IDS),
}
HIDDEN = {
    "session_id": 2**64 - 1,
    "seq_pos": 7,
    "payload_type": "hidden_states",
    "shape": [1, 2, 3],
    "data": struct.pack("<6e", 0, 1, -2, 0.5, 65504, float("inf")),
}
RESPONSE = {
    "session_id": 12345,
    "response_type": "logits",
    "shape": [1, 1, 4],
    "data": struct.pack("<4e", 1, 2, 3, 4),
    "error": None,
}
STEP = RESPONSE | {"response_type": "hidden_states", "shape": [1, 2, 2]}


def rust(fields: dict) -> bytes:
    """As Rust peers write it: bytes as integers."""
    return msgpack.packb({k: list(v) if isinstance(v, bytes) else v for k, v in fields.items()})


def joined(message) -> bytes:
    return b"".join(message.parts())


def test_golden_request():
    assert rust(REQUEST) == GOLDEN
    request = InferenceRequest.read(GOLDEN)
    assert (request.session_id, request.seq_pos, request.shape) == (12345, 0, (4,))
    assert request.payload_type is PayloadType.TOKEN_IDS
    assert request.token_ids().tolist() == IDS
    assert request.token_ids().dtype == torch.int64
    assert request.tokens == 4


def test_we_send_the_same_with_bin():
    request = InferenceRequest.of_token_ids(12345, 0, IDS)
    assert joined(request) == msgpack.packb(REQUEST)
    assert request == InferenceRequest.read(GOLDEN) == request.copied()


@pytest.mark.parametrize("packed", [msgpack.packb, rust])
def test_hidden_states(packed):
    request = InferenceRequest.read(packed(HIDDEN))
    assert request.tokens == 2
    expected = torch.tensor([[[0, 1, -2], [0.5, 65504, float("inf")]]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = request.hidden_states(dtype)
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype))
        got.zero_()  # it is ours
    assert joined(request) == msgpack.packb(HIDDEN)


@pytest.mark.parametrize("packed", [msgpack.packb, rust])
@pytest.mark.parametrize("fields", [RESPONSE, STEP])
def test_responses(packed, fields):
    response = InferenceResponse.read(packed(fields))
    assert response.response_type == fields["response_type"]
    assert response.values().shape == tuple(fields["shape"])
    assert response.values().flatten().tolist() == [1, 2, 3, 4]
    again = InferenceResponse.of_values(12345, response.response_type, response.values())
    assert joined(again) == joined(response) == msgpack.packb(fields)


def test_keys_in_any_order_unknown_ones_and_no_error():
    backwards = dict(reversed(HIDDEN.items())) | {"dtype": "f16", "trace": {"a": [1, 2]}}
    assert InferenceRequest.read(msgpack.packb(backwards)) == InferenceRequest.read(msgpack.packb(HIDDEN))
    without = {k: v for k, v in RESPONSE.items() if k != "error"}
    assert InferenceResponse.read(msgpack.packb(without)).error is None


def test_a_server_that_warms_up():
    answer = {
        "session_id": 0,
        "response_type": "hidden_states",
        "shape": [],
        "data": b"",
        "error": WARMING_UP,
    }
    response = InferenceResponse.read(rust(answer))
    assert (response.error, response.shape, bytes(response.data)) == (WARMING_UP, (), b"")
    with pytest.raises(ValueError, match="warming up"):
        response.values()
    assert joined(InferenceResponse.of_error(0, WARMING_UP)) == msgpack.packb(answer)


def test_values_beside_an_error_are_dropped():
    response = InferenceResponse.read(msgpack.packb(RESPONSE | {"error": "", "shape": [9, 9]}))
    assert (response.error, response.shape, bytes(response.data)) == ("", (), b"")


def test_long_and_odd_error_texts():
    response = InferenceResponse.read(msgpack.packb(RESPONSE | {"error": "x" * 100_000}))
    assert response.error == "x" * 1000
    sent = InferenceResponse.of_error(1, "bad \udc80" + "y" * 5000)
    assert msgpack.unpackb(joined(sent))["error"].startswith("bad \\udc80y")
    assert len(InferenceResponse.read(joined(sent)).error) == 1000


BAD_NUMBERS = [(-1, "-1, which"), (1.0, "a float"), ("1", "text"), (None, "nil"), (True, "a boolean")]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        *[("session_id", v, f"session_id is {c}") for v, c in BAD_NUMBERS],
        *[("seq_pos", v, f"seq_pos is {c}") for v, c in BAD_NUMBERS],
        ("seq_pos", 2**32, "seq_pos is 4294967296, which is not within 32 bits"),
        ("seq_pos", 2**32 - 3, "seq_pos is 4294967293, too much for 4 tokens"),
        ("payload_type", "logits", "payload_type is 'logits', none of token_ids, hidden_states"),
        ("payload_type", "TokenIds", "payload_type is 'TokenIds'"),
        ("payload_type", 0, "payload_type is an integer"),
        ("shape", [3], r"data has 16 bytes; token_ids of shape \[3\] have 12"),
        ("shape", [5], r"data has 16 bytes; token_ids of shape \[5\] have 20"),
        ("shape", [], r"shape \[\] has 0 dimensions; token_ids have 1"),
        ("shape", [1, 4], r"shape \[1, 4\] has 2 dimensions; token_ids have 1"),
        ("shape", [2**32 - 1], r"token_ids of shape \[4294967295\] have 17179869180"),
        ("shape", [2**32], "shape is 4294967296"),
        ("shape", [1] * 17, "shape has 17 dimensions"),
        ("shape", b"\x04", "shape is bytes, not an array"),
        ("data", b"", "data has 0 bytes; token_ids"),
        ("data", b"x" * 17, "data has 17 bytes; token_ids"),
        ("data", "x" * 16, "data is text"),
        ("data", None, "data is nil"),
        ("data", [256], "data: item 0 begins with 0xcd"),
        ("data", [-1], "data: item 0 begins with 0xff"),
        ("data", [1.5], "data: item 0 begins with 0xcb"),
    ],
)
def test_bad_requests(field, value, complaint):
    with pytest.raises(RemoteError, match=complaint):
        InferenceRequest.read(msgpack.packb(REQUEST | {field: value}))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ([6], "1 dimensions; hidden_states have 3"),
        ([1, 1, 2, 3], "4 dimensions; hidden_states have 3"),
        ([2, 1, 3], "a batch of 2; hidden_states have 1"),
        ([0, 2, 3], "a batch of 0"),
        ([1, 0, 3], "has no values"),
        ([1, 2, 0], "has no values"),
        ([1, 2, 4], "data has 12 bytes"),
        ([1, 2**32 - 1, 2**32 - 1], "data has 12 bytes; hidden_states of shape"),
    ],
)
def test_bad_shapes_of_hidden_states(shape, complaint):
    with pytest.raises(RemoteError, match=complaint):
        InferenceRequest.read(msgpack.packb(HIDDEN | {"shape": shape}))
    with pytest.raises(RemoteError, match=complaint):
        InferenceResponse.read(
            msgpack.packb(
                {k: v for k, v in HIDDEN.items() if k not in ("seq_pos", "payload_type")}
                | {"response_type": "hidden_states", "shape": shape}
            )
        )


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("session_id", 2.5, "session_id is a float"),
        ("response_type", "token_ids", "response_type is 'token_ids', none of hidden_states, logits"),
        ("shape", [1, 2, 2], r"shape \[1, 2, 2\] is that of logits of 2 tokens"),
        ("shape", [], "0 dimensions; logits have 3"),
        ("data", b"", "data has 0 bytes"),
        ("error", 5, "error is an integer, not text"),
        ("error", b"x", "error is bytes, not text"),
    ],
)
def test_bad_responses(field, value, complaint):
    with pytest.raises(RemoteError, match=complaint):
        InferenceResponse.read(msgpack.packb(RESPONSE | {field: value}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(InferenceRequest, REQUEST), (InferenceResponse, RESPONSE)],
    ids=["request", "response"],
)
def test_every_field_must_be_there_once(kind, fields):
    for absent in set(fields) - {"error"}:
        with pytest.raises(RemoteError, match=f"{absent} is absent"):
            kind.read(msgpack.packb({k: v for k, v in fields.items() if k != absent}))
    for twice in fields:
        data = bytearray(msgpack.packb(fields) + msgpack.packb(twice) + msgpack.packb(fields[twice]))
        data[0] += 1
        with pytest.raises(RemoteError, match=f"{twice} comes twice"):
            kind.read(bytes(data))
    packed = msgpack.packb(fields)
    for end in range(len(packed)):
        with pytest.raises(RemoteError):
            kind.read(packed[:end])
    with pytest.raises(RemoteError, match="1 bytes follow the message"):
        kind.read(packed + b"\x00")
    with pytest.raises(RemoteError, match="is an array, not a map"):
        kind.read(msgpack.packb(list(fields.values())))


# --- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_go_as_float16(dtype):
    hidden = torch.tensor([[[0.1, -70000.0, float("inf")], [1e-9, float("nan"), 3.0]]], dtype=dtype)
    request = InferenceRequest.of_hidden_states(1, 0, hidden)
    got = request.hidden_states(torch.float64).flatten()
    assert got[4].isnan()
    assert got[0] == hidden[0, 0, 0].to(torch.float16)
    largest = 65504.0 if dtype != torch.float16 else float("inf")
    assert got[[1, 2, 3, 5]].tolist() == [-largest, largest, 0.0, 3.0]


def test_tensors_are_copied_only_where_they_must_be():
    hidden = torch.ones(1, 2, 3, dtype=torch.float16)
    request = InferenceRequest.of_hidden_states(1, 0, hidden)
    hidden.zero_()
    assert not request.hidden_states().any()
    turned = torch.arange(6.0).reshape(1, 3, 2).transpose(1, 2)
    assert torch.equal(InferenceRequest.of_hidden_states(1, 0, turned).hidden_states(), turned)
    packed = msgpack.packb(HIDDEN)
    assert InferenceRequest.read(packed).data.obj is packed


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (1, 0, 3), (1, 2, 0), (1, 1, 2, 3)])
def test_our_own_shapes_are_checked(shape):
    with pytest.raises(ValueError, match="values of shape"):
        InferenceRequest.of_hidden_states(1, 0, torch.ones(shape))


def test_our_own_mistakes():
    with pytest.raises(CompressionError, match="int64"):
        InferenceRequest.of_hidden_states(1, 0, torch.ones(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="last token alone"):
        InferenceResponse.of_values(1, ResponseType.LOGITS, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="session_id is 18446744073709551616"):
        InferenceRequest.of_token_ids(2**64, 0, [1])
    with pytest.raises(ValueError, match="seq_pos is -1"):
        InferenceRequest.of_token_ids(1, -1, [1])
    with pytest.raises(ValueError, match="a token id is 4294967296"):
        InferenceRequest.of_token_ids(1, 0, [2**32])
    with pytest.raises(ValueError, match="no token ids"):
        InferenceRequest.of_token_ids(1, 0, [])
    with pytest.raises(ValueError, match="no hidden states"):
        InferenceRequest.of_token_ids(1, 0, [1]).hidden_states()
    with pytest.raises(ValueError, match="no token ids"):
        InferenceRequest.of_hidden_states(1, 0, torch.ones(1, 1, 1)).token_ids()
    with pytest.raises(ValueError, match="session_id"):
        InferenceResponse.of_error(-1, "x")


# --- properties ----------------------------------------------------------------------------------------------

u64, u31 = st.integers(0, 2**64 - 1), st.integers(0, 2**31)
requests = st.one_of(
    st.builds(
        InferenceRequest.of_token_ids, u64, u31, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)
    ),
    st.builds(
        lambda session, pos, n, width, seed: InferenceRequest.of_hidden_states(
            session, pos, torch.randn(1, n, width, generator=torch.Generator().manual_seed(seed))
        ),
        u64,
        u31,
        st.integers(1, 5),
        st.integers(1, 70),
        st.integers(0, 99),
    ),
)


@QUICK
@given(requests)
def test_round_trips(request):
    packed = joined(request)
    fields = msgpack.unpackb(packed)
    assert list(fields) == ["session_id", "seq_pos", "payload_type", "shape", "data"]
    assert msgpack.packb(fields) == packed
    assert InferenceRequest.read(packed) == InferenceRequest.read(rust(fields)) == request


@QUICK
@given(
    st.sampled_from([msgpack.packb(HIDDEN), rust(REQUEST), rust(RESPONSE)]),
    st.integers(0, 1 << 16),
    st.integers(0, 255),
    st.binary(max_size=9),
)
def test_any_bytes_are_read_or_refused(data, position, byte, tail):
    broken = bytearray(data + tail)
    broken[position % len(broken)] = byte
    for kind in (InferenceRequest, InferenceResponse):
        try:
            message = kind.read(bytes(broken))
        except RemoteError:
            continue
        assert kind.read(joined(message)) == message


def test_in_the_envelope():
    request = InferenceRequest.of_token_ids(12345, 0, IDS)
    wire = envelope.encode_call(bytes(16), b"peer", PROTOCOL, *request.parts())
    (body,) = envelope.DelimitedDecoder(1 << 16).feed(wire)
    call = envelope.decode_call(body)
    assert call.protocol == "/kwaai/inference/1.0.0"
    assert InferenceRequest.read(call.data) == request
