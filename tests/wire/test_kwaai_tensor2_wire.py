"""Bytes of /kwaai/tensor/2.0.0: golden frames, an encoder by hand, the protobuf library, limits, any tensors."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import kwaai_tensor2_by_hand as hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import codec
from kwaainet_bridge.compression.encoded import DTYPES
from kwaainet_bridge.compression.kwaai import dequantise_blocks, quantise_blocks
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire import kwaai_tensor2 as wire
from kwaainet_bridge.wire.frames import Frame
from kwaainet_bridge.wire.kwaai_tensor2 import Ack, Code, End, IncomingTensor, Offer, Part
from kwaainet_bridge.wire.kwaai_tensor2_values import (
    Compression,
    UnsupportedValues,
    check_values,
    compression_of,
    decode_values,
    encode_values,
    memory_needed,
    new_buffer,
)
from kwaainet_bridge.wire.pb import kwaai_tensor_pb2 as pb

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "kwaai-tensor.md"
FLOATS = struct.pack("<4f", 0, 1, -2, 0.5)

GOLDEN = [
    (
        hand.offer(1, "h", "float32", (2, 2), 0, 16, {"step": "3"}),
        Offer(number=1, name="h", dtype="float32", shape=(2, 2), bytes=16, metadata={"step": "3"}),
    ),
    (hand.ack(1, 1), Ack(1, Code.ACCEPTED)),
    (hand.part(1, 0, FLOATS[:8]), Part(1, 0, FLOATS[:8])),
    (hand.part(1, 8, FLOATS[8:]), Part(1, 8, FLOATS[8:])),
    (hand.ack(1, 2, count=16), Ack(1, Code.RECEIVED, bytes=16)),
    (
        hand.offer(2, "s", "bfloat16", (), 0, 2, data=b"\x80\x3f"),
        Offer(number=2, name="s", dtype="bfloat16", bytes=2, data=b"\x80\x3f"),
    ),
    (hand.offer(3, "e", "int64", (0, 4)), Offer(number=3, name="e", dtype="int64", shape=(0, 4))),
    (
        hand.offer(4, "q", "float32", (3,), 64, 5, data=struct.pack("<e3b", 1 / 127, 127, -127, 64)),
        Offer(
            number=4,
            name="q",
            dtype="float32",
            shape=(3,),
            compression=Compression.KWAAI_INT8,
            bytes=5,
            data=struct.pack("<e3b", 1 / 127, 127, -127, 64),
        ),
    ),
    (
        hand.offer(5, "k", "float32", (6,), 65, 16, data=struct.pack("<2I2f", 1, 4, 1, -2)),
        Offer(
            number=5,
            name="k",
            dtype="float32",
            shape=(6,),
            compression=Compression.KWAAI_TOP_K,
            bytes=16,
            data=struct.pack("<2I2f", 1, 4, 1, -2),
        ),
    ),
    (hand.ack(6, 3, "no"), Ack(6, Code.REFUSED, "no")),
    (hand.ack(7, 5, "big", 1 << 29), Ack(7, Code.TOO_LARGE, "big", 1 << 29)),
    (hand.end(), End()),
    (hand.end(9, "bad"), End(Code.PROTOCOL, "bad")),
]


def read(data: bytes):
    decoder = wire.frame_decoder()
    messages = [wire.read_message(frame) for frame in decoder.feed(data)]
    decoder.feed(b"")
    decoder.finish()
    return messages


def write(message) -> bytes:
    if isinstance(message, Offer):
        return wire.encode_offer(message)
    if isinstance(message, Part):
        return wire.encode_part(message.number, message.offset, [message.data])
    return wire.encode_ack(message) if isinstance(message, Ack) else wire.encode_end(message)


def received(offer: Offer, data: bytes, size: int = 7) -> torch.Tensor:
    coming = IncomingTensor(offer)
    for at in range(0, len(data), size):
        assert not coming.complete
        coming.add(Part(offer.number, at, data[at : at + size]))
    return coming.tensor()


# --- golden bytes


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_frames(number):
    by_hand, message = GOLDEN[number]
    assert write(message).hex() == by_hand.hex()
    assert read(by_hand) == [message]


def test_the_page_has_these_bytes():
    rows = re.findall(r"\| `([0-9a-f]{18,})` \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [by_hand.hex() for by_hand, _ in GOLDEN]


def test_golden_tensors():
    floats, q, k, s = (GOLDEN[i][1] for i in (0, 7, 8, 5))
    assert received(floats, FLOATS).tolist() == [[0, 1], [-2, 0.5]]
    assert IncomingTensor(q).tensor().tolist() == pytest.approx([1, -1, 64 / 127], rel=1e-3)
    assert IncomingTensor(k).tensor().tolist() == [0, 1, 0, 0, -2, 0]
    scalar = IncomingTensor(s).tensor()
    assert (scalar.item(), scalar.dtype, scalar.shape) == (1, torch.bfloat16, ())
    assert tuple(IncomingTensor(GOLDEN[6][1]).tensor().shape) == (0, 4)


def test_the_page_names_every_code_and_compression():
    text = PAGE.read_text()
    for code in Code:
        assert f"| {code.value} | {code.name}" in text
        assert pb.Code.Value(code.name) == code.value
    for compression in Compression:
        assert f"| {compression.value} | {compression.name} |" in text
        assert pb.Compression.Value(compression.name) == compression.value
    assert set(pb.Code.keys()) == set(Code.__members__)
    assert set(pb.Compression.keys()) == set(Compression.__members__)
    for limit in (wire.MAX_FRAME_BYTES, defaults.MAX_TENSOR2_PART_BYTES, defaults.MAX_TENSOR2_OFFER_BYTES):
        assert f"{limit:,}" in text


def test_hiveminds_numbers():
    from kwaainet_bridge.compression import CompressionType

    assert {c.name: c.value for c in Compression if c < 64} == {c.name: c.value for c in CompressionType}


# --- the protobuf library


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_the_library_reads_the_same(number):
    by_hand, message = GOLDEN[number]
    payload = by_hand[9:]
    if isinstance(message, End):
        parsed = pb.End.FromString(payload)
        assert (parsed.code, parsed.text) == (message.code, message.text)
        return
    parsed = pb.Message.FromString(payload)
    kind = parsed.WhichOneof("kind")
    assert kind == type(message).__name__.lower()
    fields = getattr(parsed, kind)
    for name in ("number", "offset", "data", "name", "dtype", "compression", "bytes", "code", "text"):
        if hasattr(message, name):
            assert getattr(fields, name) == getattr(message, name)
    assert parsed.SerializeToString(deterministic=True) == payload


def test_messages_whose_fields_are_all_zero():
    assert read(write(Ack(0, Code.OK))) == [Ack(0, Code.OK)]
    assert read(write(Part(0, 0, b"a"))) == [Part(0, 0, b"a")]


def test_fields_of_later_versions_are_skipped():
    later = hand.content(15, b"abc") + hand.number(16, 7)
    assert read(hand.offer(1, "h", "float32", count=4, more=later)) == [
        Offer(number=1, name="h", dtype="float32", bytes=4)
    ]
    body = hand.content(3, hand.number(1, 1) + hand.number(2, 3) + later)
    assert read(hand.frame(0, later + body)) == [Ack(1, Code.REFUSED)]


def test_a_shape_that_is_not_packed():
    body = hand.number(1, 1) + hand.content(2, b"h") + hand.content(3, b"int8")
    body += hand.number(4, 2) + hand.number(4, 300) + hand.number(6, 600)
    assert read(hand.frame(0, hand.content(1, body)))[0].shape == (2, 300)


# --- what is refused


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "0 of offer, part and ack"),
        (hand.content(3, hand.number(1, 1)) * 2, "2 of offer, part and ack"),
        (hand.content(1, b"\xff"), "no Offer"),
        (hand.content(3, b"\xff"), "no Ack"),
        (hand.content(1, hand.number(1, 1)), "name has 0 bytes"),
        (hand.content(1, hand.content(2, b"\xff\xfe")), "no Offer"),
        (hand.offer(1, "n" * 1025, "int8")[9:], "name has 1025 bytes"),
        (hand.offer(1, "n", "int8", (1,) * 17)[9:], "17 dimensions"),
        (hand.offer(1, "n", "int8", metadata={str(i): "" for i in range(65)})[9:], "65 entries"),
        (hand.offer(1, "n", "int8", metadata={"a": "b" * 33_000})[9:], "at most 32768"),
        (hand.offer(1, "n", "int8", (3,), 0, 3, data=b"ab")[9:], "2 of 3 bytes"),
        (hand.offer(1, "n", "int8", (70_000,), 0, 70_000, data=bytes(70_000))[9:], "at most 65536"),
        (hand.offer(1, "n", "int8", (99_000,), 0, 99_000, data=bytes(99_000))[9:], "offer has"),
        (hand.part(1, 0, b"")[9:], "data is empty"),
        (hand.part(1, 0, bytes((1 << 20) + 1))[9:], "at most 1048576"),
        (hand.content(2, hand.content(1, b"a")), "number has wire type 2"),
        (hand.ack(1, 3, "x" * 5000)[9:], "ack has"),
    ],
)
def test_messages_that_are_refused(payload, text):
    with pytest.raises(RemoteError, match=text):
        wire.read_message(Frame(0, payload))


def test_ends_that_are_refused():
    for payload, text in ((b"\xff", "no End"), (hand.end(1, "x" * 5000)[9:], "end has")):
        with pytest.raises(RemoteError, match=text):
            wire.read_message(Frame(1, payload))


def test_frames_that_are_refused():
    for head in (struct.pack(">QB", wire.MAX_FRAME_BYTES + 1, 0), b"\xff" * 9, struct.pack(">QB", 4, 2)):
        with pytest.raises(RemoteError):
            read(head)
    with pytest.raises(RemoteError, match="marker first"):
        read(struct.pack(">BQ", 1, 300))
    with pytest.raises(RemoteError, match="cut after 3 of"):
        read(hand.ack(1, 2)[:12])


@pytest.mark.parametrize(
    ("dtype", "shape", "compression", "count", "error"),
    [
        ("float8", (1,), 0, 1, UnsupportedValues),
        ("float32", (1,), 6, 4, UnsupportedValues),
        ("float32", (1,), -1, 4, UnsupportedValues),
        ("bfloat16", (2,), 2, 4, UnsupportedValues),
        ("int64", (2,), 1, 4, UnsupportedValues),
        ("int8", (2,), 3, 1034, UnsupportedValues),
        ("float32", (), 1, 10, UnsupportedValues),
        ("bool", (1 << 16, 1 << 16), 65, 8, RemoteError),
        ("float32", (2, 2), 0, 15, RemoteError),
        ("bfloat16", (2,), 0, 8, RemoteError),
        ("float32", (1 << 40, 1 << 40), 0, 4, RemoteError),
        ("float32", (0, 1 << 62), 0, 0, RemoteError),
        ("float32", (65,), 64, 67, RemoteError),
        ("float32", (6,), 65, 0, RemoteError),
        ("float32", (6,), 65, 12, RemoteError),
        ("float32", (6,), 65, 56, RemoteError),
        ("float32", (0,), 65, 8, RemoteError),
    ],
)
def test_offers_that_contradict_themselves(dtype, shape, compression, count, error):
    with pytest.raises(error) as caught:
        check_values(dtype, shape, compression, count)
    assert (type(caught.value) is UnsupportedValues) == (error is UnsupportedValues)


def decode(dtype: str, shape, compression: Compression, data: bytes) -> torch.Tensor:
    kind = check_values(dtype, shape, compression, len(data))
    buffer = new_buffer(len(data))
    memoryview(buffer.numpy())[:] = data
    return decode_values(buffer, *kind)


@pytest.mark.parametrize(
    ("dtype", "shape", "compression", "data"),
    [
        ("bool", (2,), Compression.NONE, b"\x01\x02"),
        ("float32", (1,), Compression.KWAAI_INT8, struct.pack("<eb", float("inf"), 1)),
        ("float32", (6,), Compression.KWAAI_TOP_K, struct.pack("<2I2f", 4, 1, 1, 1)),
        ("float32", (6,), Compression.KWAAI_TOP_K, struct.pack("<2I2f", 4, 4, 1, 1)),
        ("float32", (6,), Compression.KWAAI_TOP_K, struct.pack("<2I2f", 4, 6, 1, 1)),
        ("float32", (6,), Compression.KWAAI_TOP_K, struct.pack("<I1f", 4, float("nan"))),
        ("float32", (1,), Compression.UNIFORM_8BIT, struct.pack("<q", 255) + bytes(1025)),
        ("float32", (1,), Compression.BLOCKWISE_8BIT, struct.pack("<2q", 2, 256) + bytes(1029)),
        ("bfloat16", (1,), Compression.BLOCKWISE_8BIT, struct.pack("<2q", 2, 256) + bytes(1029)),
        ("bfloat16", (1,), Compression.BLOCKWISE_8BIT, struct.pack("<2q", 1, 255) + bytes(1029)),
    ],
)
def test_values_that_do_not_decode(dtype, shape, compression, data):
    with pytest.raises(RemoteError):
        decode(dtype, shape, compression, data)


def test_parts_that_are_not_the_next():
    offer = GOLDEN[0][1]
    for part, text in (
        (Part(2, 0, b"a"), "part of tensor 2 where one of 1 is due"),
        (Part(1, 4, b"a"), "part at 4 where byte 0 is due"),
        (Part(1, 0, bytes(17)), "the tensor has 16"),
    ):
        coming = IncomingTensor(offer)
        with pytest.raises(RemoteError, match=text):
            coming.add(part)
        assert not coming.complete
        with pytest.raises(ValueError, match="0 of 16"):
            coming.tensor()


def test_what_cannot_be_written():
    plain = {"number": 1, "dtype": "int8"}
    for offer in (
        Offer(name="", **plain),
        Offer(name="é" * 513, **plain),
        Offer(name="\ud800", **plain),
        Offer(name="n", shape=(1,) * 17, **plain),
        Offer(name="n", metadata={"a": "b" * 33_000}, **plain),
        Offer(name="n", bytes=5, data=b"1234", **plain),
    ):
        with pytest.raises(ValueError):
            wire.encode_offer(offer)
    for tensor, compression in (
        (torch.ones(2, dtype=torch.complex64), 0),
        (torch.ones(2, dtype=torch.bfloat16), "FLOAT16"),
        (torch.ones(2, dtype=torch.int64), "UNIFORM_8BIT"),
        (torch.ones(()), "MEANSTD_16BIT"),
        (torch.tensor([float("inf")]), "KWAAI_INT8"),
        (torch.tensor([float("inf")]), "KWAAI_TOP_K"),
        (torch.tensor([1e300], dtype=torch.float64), "KWAAI_TOP_K"),
        (torch.tensor([float("nan")]), "KWAAI_TOP_K"),
        (torch.ones(2), "LZMA"),
    ):
        with pytest.raises(CompressionError):
            encode_values(tensor, compression)
    with pytest.raises(CompressionError, match="KWAAI_TOP_K"):
        compression_of(7)


def test_long_texts_are_cut():
    long = "é\ud800" * 5000
    [ack] = read(wire.encode_ack(Ack(1, Code.FAILED, long)))
    [end] = read(wire.encode_end(End(Code.PROTOCOL, long)))
    assert ack.text == end.text
    assert len(ack.text) == defaults.MAX_ERROR_CHARACTERS


# --- any tensors


def carried(compression: Compression) -> list[str]:
    def goes(name):
        try:
            check_values(name, (1,), compression, -1)
        except UnsupportedValues:
            return False
        except RemoteError:
            return True
        raise AssertionError

    return [name for name in DTYPES if goes(name)]


@st.composite
def any_tensor(draw):
    compression = draw(st.sampled_from(Compression))
    dtype = DTYPES[draw(st.sampled_from(carried(compression)))]
    fewest = 1 if compression == Compression.MEANSTD_16BIT else 0
    shape = draw(st.lists(st.integers(0, 9), min_size=fewest, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return values, compression


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int32", "float32"])
@pytest.mark.parametrize("compression", [Compression.BLOCKWISE_8BIT, Compression.KWAAI_INT8])
@pytest.mark.parametrize("count", [(1 << 18) - 1, 1 << 18, (1 << 18) + 65, 600_001])
def test_decoding_piece_by_piece_gives_what_decoding_in_one_does(dtype, compression, count):
    values = (torch.randn(count, generator=torch.Generator().manual_seed(2)) * 99).to(DTYPES[dtype])
    data = b"".join(encode_values(values, compression))
    if compression == Compression.KWAAI_INT8:
        whole = dequantise_blocks(quantise_blocks(values), DTYPES[dtype])
    else:
        whole = codec(compression.value).decompress(data, (count,), DTYPES[dtype])
    assert torch.equal(decode(dtype, (count,), compression, data), whole)


@QUICK
@given(case=any_tensor(), size=st.integers(1, 5000), top_k=st.floats(0, 1))
def test_tensors_come_back(case, size, top_k):
    tensor, compression = case
    values = encode_values(tensor, compression, top_k=top_k)
    data = b"".join(values)
    kind = check_values(str(tensor.dtype)[6:], tensor.shape, compression, len(data))
    assert memory_needed(*kind, len(data)) >= len(data)
    offer = Offer(
        number=1,
        name="t",
        dtype=str(tensor.dtype)[6:],
        shape=tuple(tensor.shape),
        compression=compression,
        bytes=len(data),
    )
    assert [b"".join(p) for p in wire.slices(values, size)] == [
        data[at : at + size] for at in range(0, len(data), size)
    ]
    again = received(offer, data, size)
    assert (again.shape, again.dtype, again.is_contiguous()) == (tensor.shape, tensor.dtype, True)
    if compression == Compression.NONE:
        assert torch.equal(again, tensor)
    elif compression == Compression.KWAAI_TOP_K:
        kept = again != 0
        assert torch.equal(again[kept], tensor[kept])
        assert int(kept.sum()) <= max(1, int(tensor.numel() * top_k))
    elif compression == Compression.KWAAI_INT8 and tensor.dtype == torch.float32 and tensor.numel():
        assert (again - tensor).abs().max() <= tensor.abs().max() / 127
    elif compression == Compression.FLOAT16:
        assert torch.allclose(again.double(), tensor.double(), rtol=1e-3)
    if again.numel() and again.dtype != torch.bool:
        again.reshape(-1)[0] = 1  # it is writable


@QUICK
@given(
    number=st.integers(0, (1 << 64) - 1),
    name=st.text(min_size=1, max_size=200),
    dtype=st.text(max_size=20),
    shape=st.lists(st.integers(0, (1 << 64) - 1), max_size=16),
    compression=st.integers(0, (1 << 31) - 1),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=9),
    data=st.binary(max_size=99),
)
def test_offers_come_back(number, name, dtype, shape, compression, metadata, data):  # noqa: PLR0917
    offer = Offer(
        number=number,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        compression=compression,
        bytes=len(data),
        metadata=metadata,
        data=data,
    )
    frame = wire.encode_offer(offer)
    assert read(frame) == [offer]
    # maps are written in the order of their keys' bytes: an encoder by hand does the same
    if number and list(metadata) == sorted(metadata, key=str.encode) and all(metadata.items()):
        by_hand = hand.offer(number, name, dtype, shape, compression, len(data), metadata, data)
        if dtype:
            assert len(by_hand) == len(frame)
        assert read(by_hand) == [offer]
