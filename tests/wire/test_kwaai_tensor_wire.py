"""Messages of /kwaai/tensor/1.0.0. The quantised tensor alone: tests/compression/test_kwaai_tensor.py."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK, cut, cuts, outcome

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.kwaai import QuantisedBlocks, dequantise_blocks, quantise_blocks
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.kwaai_tensor import (
    KwaaiTensorDecoder,
    KwaaiTensorMessage,
    TensorMessageType,
    encode_frame,
    read_message,
    receipt,
    tensor_message,
)

# made by the serialiser that KwaaiNet uses
DATA = bytes.fromhex(
    "000000550000000001000000000000006701040000000000000000408120010000000000000008240100000000000000040000000000"
    "0000400000000000000001000000000000000400000000000000"
    "01000000000000006d"
)
ACK = bytes.fromhex("0100000001000000000000006700000000000000000008000000000000007265636569766564")
VALUES = torch.tensor([0, 1, -2, 0.5])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def body(
    *,
    kind=0,
    name=b"g",
    option=b"\x01",
    data=b"\x00\x40\x81\x20",
    scales=b"\x08\x24",
    inner=(4,),
    block=64,
    shape=(4,),
    metadata=b"m",
) -> bytes:
    """Bincode written out by hand."""
    tensor = b""
    if option == b"\x01":
        tensor = text(data) + struct.pack("<Q", len(scales) // 2) + scales
        tensor += struct.pack(f"<Q{len(inner)}QQ", len(inner), *inner, block)
    return b"".join(
        [
            struct.pack("<I", kind),
            text(name),
            option,
            tensor,
            struct.pack(f"<Q{len(shape)}Q", len(shape), *shape),
            text(metadata),
        ]
    )


def test_golden():
    message = tensor_message("g", quantise_blocks(VALUES), metadata="m")
    assert encode_frame(message) == DATA
    assert DATA[4:] == body()
    (got,) = KwaaiTensorDecoder().feed(DATA)
    assert (got.type, got.name, got.shape, got.metadata) == (TensorMessageType.DATA, "g", (4,), "m")
    assert torch.equal(dequantise_blocks(got.tensor), dequantise_blocks(quantise_blocks(VALUES)))
    assert encode_frame(receipt(got)) == len(ACK).to_bytes(4, "big") + ACK
    assert read_message(ACK) == KwaaiTensorMessage(TensorMessageType.ACK, "g", metadata="received")


def test_wish_for_a_tensor():
    wish = KwaaiTensorMessage(TensorMessageType.REQUEST, "layer.0", shape=(2, 3))
    frame = encode_frame(wish)
    assert frame[4:] == body(kind=2, name=b"layer.0", option=b"\x00", shape=(2, 3), metadata=b"")
    assert KwaaiTensorDecoder().feed(frame) == [wish]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": 3}, "there is no type 3"),
        ({"kind": 2**32 - 1}, "there is no type 4294967295"),
        ({"name": b"\xff"}, "name is not UTF-8"),
        ({"metadata": b"\xff"}, "metadata is not UTF-8"),
        ({"name": b"x" * 65537}, "name has 65537 bytes, at most 65536"),
        ({"metadata": b"x" * 65537}, "metadata has 65537 bytes"),
        ({"option": b"\x02"}, "data has tag 2"),
        ({"option": b"\x00"}, "DATA without a tensor"),
        ({"kind": 1}, "ACK with a tensor"),
        ({"kind": 2}, "REQUEST with a tensor"),
        ({"block": 0}, "block_size is 0"),
        ({"block": 1}, "scales has 1 values for 4 blocks of 1"),
        ({"scales": b"\x08\x24" * 2}, "scales has 2 values for 1 blocks of 64"),
        ({"scales": b"\x00\x7c"}, "scales has values that are not finite"),
        ({"scales": b"\x01\x7e"}, "scales has values that are not finite"),
        ({"data": b"\x00" * 5}, r"data has 5 values, shape \[4\] 4"),
        ({"inner": (5,)}, r"data has 4 values, shape \[5\] 5"),
        ({"inner": (1,) * 17}, "quantised tensor: shape has 17 dimensions"),
        ({"inner": (2**40, 2**40)}, "more than 2147483648 elements"),
        ({"shape": (2, 2)}, r"shape is \[2, 2\], that of the tensor \[4\]"),
        ({"shape": ()}, r"shape is \[\], that of the tensor \[4\]"),
        ({"shape": (1,) * 17}, "tensor message: shape has 17 dimensions"),
    ],
)
def test_what_the_original_takes_and_we_do_not(fields, complaint):
    with pytest.raises(RemoteError, match=complaint):
        read_message(body(**fields))


def test_cut_and_long():
    for whole in (DATA[4:], ACK):
        for end in range(len(whole)):
            with pytest.raises(RemoteError, match=r"ends early|announces"):
                read_message(whole[:end])
        with pytest.raises(RemoteError, match="1 bytes behind metadata"):
            read_message(whole + b"\x00")


def test_counts_are_not_believed():
    for at in (4, 14, 26, 36, 60, 76):
        data = bytearray(DATA[4:])
        data[at : at + 8] = b"\xff" * 8
        with pytest.raises(
            RemoteError, match=r"announces 18446744073709551615 items|block_size|shape is|scales"
        ):
            read_message(bytes(data))


def test_length_is_bounded():
    with pytest.raises(RemoteError, match="67108865 bytes announced"):
        KwaaiTensorDecoder().feed((defaults.MAX_TENSOR_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(RemoteError, match="85 bytes announced, at most 84"):
        KwaaiTensorDecoder(84).feed(DATA)
    decoder = KwaaiTensorDecoder()
    assert decoder.feed(DATA[:50]) == []
    with pytest.raises(RemoteError, match="cut after 46 of 85"):
        decoder.finish()


def test_our_own_mistakes():
    for message in (
        KwaaiTensorMessage(TensorMessageType.DATA, "g"),
        KwaaiTensorMessage(TensorMessageType.ACK, "g", quantise_blocks(VALUES), (4,)),
        KwaaiTensorMessage(TensorMessageType.ACK, "g" * 65537),
    ):
        with pytest.raises(ValueError):
            encode_frame(message)
    large = QuantisedBlocks(
        torch.zeros(1 << 26, dtype=torch.int8), torch.ones(1 << 20, dtype=torch.float16), (1 << 26,)
    )
    with pytest.raises(ValueError, match="at most 67108864"):
        encode_frame(tensor_message("g", large))


@QUICK
@given(
    st.text(max_size=20),
    st.text(max_size=20),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 100),
    cuts,
)
def test_round_trips_however_cut(name, metadata, shape, block_size, positions):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    sent = tensor_message(name, quantise_blocks(values, block_size), metadata=metadata)
    frames = encode_frame(sent) + encode_frame(receipt(sent))
    (got, ack), error = outcome(KwaaiTensorDecoder(), cut(frames, positions))
    assert (error, ack) == (None, receipt(sent))
    assert (got.name, got.metadata, got.shape) == (name, metadata, tuple(shape))
    assert encode_frame(got) == encode_frame(sent)
    assert torch.equal(dequantise_blocks(got.tensor), dequantise_blocks(sent.tensor))


@QUICK
@given(st.sampled_from([DATA[4:], ACK]), st.integers(0, 200), st.integers(0, 255), st.binary(max_size=4))
def test_any_bytes_are_read_or_refused(data, position, byte, tail):
    broken = bytearray(data + tail)
    broken[position % len(broken)] = byte
    try:
        message = read_message(bytes(broken))
    except RemoteError:
        return
    assert encode_frame(message)[4:] == broken
