from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK
from wire_golden import HIVEMIND

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.compression.encoded import DTYPES
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire.pb import expert_pb2
from kwaainet_bridge.wire.tensors import (
    TensorJoiner,
    TensorMessage,
    decode_tensor,
    encode_tensor,
    split_tensor,
)

VECTORS = [vector for vector in HIVEMIND["compression"] if "error" not in vector]
REFUSALS = [vector for vector in HIVEMIND["compression"] if "error" in vector]


def joined_bytes(message: TensorMessage) -> bytes:
    return b"".join(message.parts())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(hexed: str, dtype: str, shape: list[int]) -> torch.Tensor:
    data = bytearray.fromhex(hexed)
    dtype = getattr(torch, dtype.removeprefix("torch."))
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)


def name_of(vector) -> str:
    return f"{vector['type']}-{vector['name']}"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_golden_encode(vector):
    tensor = tensor_of(vector["input_hex"], vector["dtype"], vector["shape"]).requires_grad_(
        vector["requires_grad"]
    )
    legacy = (
        len(vector["pb_hex"]) > 2 * 256
    )  # the recorder ran with USE_LEGACY_BFLOAT16 except for one vector
    message = encode_tensor(tensor, CompressionType[vector["type"]], legacy_bfloat16=legacy)
    assert joined_bytes(message).hex() == vector["pb_hex"]


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_golden_decode(vector):
    tensor = decode_tensor(TensorMessage.read(bytes.fromhex(vector["pb_hex"])))
    assert str(tensor.dtype) == vector["output_dtype"]
    assert list(tensor.shape) == vector["shape"]
    assert tensor.requires_grad == vector["output_requires_grad"]
    assert bits(tensor).hex() == vector["output_hex"]


@pytest.mark.parametrize("vector", REFUSALS, ids=name_of)
def test_golden_refusals(vector):
    dtype = {"bf16_randn_64": torch.bfloat16, "int64": torch.int64}[vector["name"]]
    with pytest.raises(ValueError, match=f"{vector['type']} does not support {dtype} tensors"):
        encode_tensor(torch.zeros(64, dtype=dtype), CompressionType[vector["type"]])


def test_both_forms_of_bfloat16():
    tensor = torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16)
    raw = encode_tensor(tensor)
    legacy = encode_tensor(tensor, legacy_bfloat16=True)
    assert (raw.buffer.hex(), raw.dtype) == ("803f204040c0", "bfloat16")
    assert (legacy.buffer.hex(), legacy.dtype) == ("0000803f00002040000040c0", "bfloat16")
    for message in (raw, legacy):
        decoded = decode_tensor(message)
        assert decoded.dtype == torch.bfloat16
        assert torch.equal(decoded, tensor)
    assert encode_tensor(tensor.float(), legacy_bfloat16=True).buffer == legacy.buffer


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize("shape", [[0], [2, 0, 64], [3, 0]])
def test_empty(compression, shape):
    decoded = decode_tensor(encode_tensor(torch.empty(shape), compression))
    assert list(decoded.shape) == shape
    assert decoded.dtype == torch.float32


def test_scalar():
    message = encode_tensor(torch.tensor(3.5))
    assert list(message.size) == []
    assert decode_tensor(message) == torch.tensor(3.5)
    message.compression = CompressionType.MEANSTD_16BIT
    with pytest.raises(RemoteError, match="MEANSTD_16BIT needs one dimension"):
        decode_tensor(message)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    message = encode_tensor(tensor)
    assert "torch." + message.dtype == str(dtype)
    decoded = decode_tensor(message)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, tensor)


@pytest.mark.parametrize("compression", list(CompressionType))
def test_strides_do_not_show(compression):
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for view in (wide.T, wide[::2, 1::3], wide.expand(2, 6, 8), wide.flip(0)):
        plain = view.contiguous().clone()
        assert joined_bytes(encode_tensor(view, compression)) == joined_bytes(
            encode_tensor(plain, compression)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compression", list(CompressionType))
def test_strides_do_not_show_in_sums_over_many_values(compression, dtype):
    """torch adds in another order where values do not follow each other."""
    wide = torch.randn(700, 900, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for view in (wide.T, wide[0, :1].expand(5000), wide.view(-1)[::7]):
        plain = view.clone(memory_format=torch.contiguous_format)
        assert joined_bytes(encode_tensor(view, compression)) == joined_bytes(
            encode_tensor(plain, compression)
        )


@pytest.mark.parametrize("compression", list(CompressionType))
def test_input_is_left_alone_and_output_is_ours(compression):
    tensor = torch.randn(1, 2, 5, requires_grad=True)
    before = tensor.detach().clone()
    message = TensorMessage.read(joined_bytes(encode_tensor(tensor, compression)))
    assert torch.equal(tensor, before)
    decoded = decode_tensor(message)
    assert decoded.requires_grad
    with torch.no_grad():
        decoded.zero_()
    assert not torch.equal(decode_tensor(message), torch.zeros(1, 2, 5))


def test_dtypes_that_do_not_travel():
    with pytest.raises(CompressionError, match="complex64"):
        encode_tensor(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CompressionError, match="no compression 6"):
        encode_tensor(torch.zeros(2), 6)


def good(compression=CompressionType.NONE) -> TensorMessage:
    return encode_tensor(torch.arange(12, dtype=torch.float32).reshape(3, 4), compression)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"dtype": ""}, "dtype ''"),
        ({"dtype": "complex64"}, "dtype 'complex64'"),
        ({"dtype": "torch.float32"}, "dtype"),
        ({"dtype": "Tensor"}, "dtype"),
        ({"dtype": "float16"}, "buffer has 48 bytes; NONE needs 24"),
        ({"compression": 6}, "no compression 6"),
        ({"compression": -1}, "no compression -1"),
        ({"size": [3, 5]}, "buffer has 48 bytes; NONE needs 60"),
        ({"size": []}, "needs 4 "),
        ({"size": [0]}, "needs 0 "),
        ({"size": [1] * 17}, "17 dimensions, at most 16"),
        ({"size": [2**32 - 1] * 2}, "more than 2147483648 elements"),
        ({"size": [2**32 - 1] * 4}, "more than 2147483648 elements"),
        ({"size": [2**32 - 1, 0]}, "more than 2147483648 elements"),
        ({"size": [2**31]}, "needs 8589934592 "),
        ({"values": []}, "buffer has 0 bytes"),
        ({"dtype": "int32", "requires_grad": True}, "requires_grad is set for torch.int32"),
        ({"dtype": "bfloat16", "values": [bytes(36)]}, "buffer has 36 bytes; NONE needs 24"),
    ],
)
def test_bad_messages(fields, complaint):
    message = good()
    for field, value in fields.items():
        setattr(message, field, value)
    with pytest.raises(RemoteError, match=f"^hidden states: .*{complaint}"):
        decode_tensor(message, name="hidden states")


@pytest.mark.parametrize("compression", list(CompressionType))
def test_every_length_but_one_is_refused(compression):
    message = good(compression)
    whole = bytes(message.buffer)
    for length in (0, 1, 7, 8, 15, 16, len(whole) - 1, len(whole) + 1, 2 * len(whole)):
        message.values = [(whole + whole)[:length]]
        with pytest.raises(
            RemoteError, match=f"buffer has {length} bytes; {compression.name} needs {len(whole)} "
        ):
            decode_tensor(message)


@pytest.mark.parametrize("compression", list(CompressionType)[1:5])
def test_integers_cannot_come_in_float_codecs(compression):
    message = good(compression)
    message.dtype = "int32"
    with pytest.raises(RemoteError, match=f"int32 cannot come as {compression.name}"):
        decode_tensor(message)


@pytest.mark.parametrize("announced", [0, 255, 257, -1, 2**62])
def test_codebook_sizes(announced):
    raw = announced.to_bytes(8, "little", signed=True)
    for compression in (CompressionType.UNIFORM_8BIT, CompressionType.QUANTILE_8BIT):
        message = good(compression)
        message.values = [raw + bytes(message.buffer)[8:]]
        with pytest.raises(RemoteError, match=f"codebook of {announced} entries"):
            decode_tensor(message)
    message = good(CompressionType.BLOCKWISE_8BIT)
    whole = bytes(message.buffer)
    message.values = [whole[:8] + raw + whole[16:]]
    with pytest.raises(RemoteError, match=f"codebook of {announced} entries"):
        decode_tensor(message)
    message.values = [raw + whole[8:]]
    with pytest.raises(RemoteError, match=f"announces {announced} blocks, 12 values make 1"):
        decode_tensor(message)


def test_golden_split():
    message = encode_tensor(torch.zeros(40_000))
    parts = list(split_tensor(message, 65536))
    expected = HIVEMIND["frames"]["split_for_streaming_160000_bytes"]
    assert [
        {
            "chunks": p.chunks,
            "dtype": p.dtype,
            "size": list(p.size),
            "buflen": len(p.buffer),
            "compression": p.compression,
        }
        for p in parts
    ] == expected


def test_split_of_one_part_and_of_none():
    (part,) = split_tensor(good())
    assert part.chunks == 1
    part.chunks = 0
    assert part == good()
    empty = encode_tensor(torch.empty(0))
    assert list(split_tensor(empty)) == [empty]
    with pytest.raises(ValueError, match="parts of 0 bytes"):
        list(split_tensor(good(), 0))


def joined(parts, **limits) -> list[TensorMessage]:
    joiner = TensorJoiner(**({"max_bytes": 1 << 20} | limits))
    done = [tensor for part in parts for tensor in joiner.feed(part)]
    return done + joiner.finish()


def test_joiner_knows_the_last_announced_part():
    parts = list(split_tensor(good(), 20))
    assert [p.chunks for p in parts] == [3, 0, 0]
    joiner = TensorJoiner(1000)
    assert joiner.feed(parts[0]) == []
    assert joiner.feed(parts[1]) == []
    assert joiner.feed(parts[2]) == [good()]
    assert joiner.finish() == []


def test_joiner_without_chunks_ends_a_tensor_at_the_next():
    """Receivers of stock peers do not read ``chunks``, so nothing makes senders write it."""
    parts = list(split_tensor(good(), 20))
    parts[0].chunks = 0
    joiner = TensorJoiner(1000)
    assert [joiner.feed(p) for p in parts] == [[], [], []]
    empty = encode_tensor(torch.empty(0))
    assert joiner.feed(empty) == [good()]
    assert joiner.finish() == [empty]
    assert joiner.finish() == []


def test_joiner_takes_whole_tensors_as_they_are():
    whole = next(split_tensor(good()))
    assert TensorJoiner(1000).feed(whole) == [whole]
    assert joined([good(), whole, good()]) == [good(), whole, good()]


def test_joiner_refusals():
    parts = list(split_tensor(good(), 20))
    with pytest.raises(RemoteError, match="dtype is empty"):
        TensorJoiner(1000).feed(parts[1])
    with pytest.raises(RemoteError, match="dtype is empty"):
        joined([*parts, parts[1]])
    with pytest.raises(RemoteError, match="2 came, 3 were announced"):
        joined(parts[:2])
    with pytest.raises(RemoteError, match="1 came, 3 were announced"):
        joined([parts[0], good()])
    with pytest.raises(RemoteError, match="1 came, 18446744073709551615 were announced"):
        joined([TensorMessage.read(expert_pb2.Tensor(dtype="float32", chunks=-1).SerializeToString())])
    with pytest.raises(RemoteError, match="more than 10 tensors"):
        joined([encode_tensor(torch.empty(0))] * 11, max_tensors=10)
    with pytest.raises(RemoteError, match="more than 60 bytes"):
        joined(parts, max_bytes=60)
    with pytest.raises(RemoteError, match="more than 60 bytes"):
        joined(itertools.repeat(encode_tensor(torch.empty(0))), max_bytes=60)
    assert len(joined([encode_tensor(torch.empty(0))] * 3, max_bytes=60)) == 3
    assert defaults.MAX_JOINED_TENSORS >= 1000


messages = st.builds(
    lambda values, compression: encode_tensor(torch.tensor(values), compression),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.sampled_from(CompressionType),
)


@QUICK
@given(st.lists(messages, max_size=4), st.integers(1, 600), st.booleans())
def test_any_part_size_joins_to_the_same_tensors(sent, part_bytes, announce):
    parts = [part for message in sent for part in split_tensor(message, part_bytes)]
    if not announce:
        for part in parts:
            part.chunks = 0
    got = joined(parts)
    for message in got:
        message.chunks = 0
    assert list(map(joined_bytes, got)) == list(map(joined_bytes, sent))


@QUICK
@given(messages, st.binary(max_size=30), st.integers(0, 2000), st.integers(0, 255))
def test_any_bytes_decode_or_raise_remote_error(message, tail, position, byte):
    wire = bytearray(joined_bytes(message) + tail)
    wire[position % len(wire)] = byte
    try:
        broken = TensorMessage.read(bytes(wire))
    except RemoteError:
        return
    try:
        decode_tensor(broken)
    except RemoteError as e:
        assert str(e).startswith("tensor: ")  # noqa: PT017 - not raising is fine too
    try:
        joined([broken])
    except RemoteError as e:
        assert str(e).startswith("tensor part")  # noqa: PT017
