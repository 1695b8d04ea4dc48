from __future__ import annotations

import collections
import math
import time
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK
from wire_golden import HIVEMIND

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.msgpack import DictionaryValue, TensorDescriptor, pack, unpack

INF = float("inf")
PYTHON_VALUES = {
    "b'key1'": b"key1",
    "42": 42,
    "['a', 1]": ["a", 1],
    "'ffn.'": "ffn.",
    "None": None,
    "True": True,
    "()": (),
    "-1": -1,
    "DictionaryDHTValue{sub:(dumps('v1'),1000.5), b'peer':(dumps(True),2000.25)}": DictionaryValue(
        INF, 2000.25, (("sub", pack("v1"), 1000.5), (b"peer", pack(True), 2000.25))
    ),
    "BatchTensorDescriptor.from_tensor(zeros(3,4))": TensorDescriptor(
        (None, 4), "torch.float32", device_type="cpu"
    ),
}


@pytest.mark.parametrize("vector", HIVEMIND["msgpack"], ids=lambda v: v["py"][:20])
def test_golden(vector):
    value = PYTHON_VALUES[vector["py"]]
    assert pack(value).hex() == vector["hex"]
    assert unpack(bytes.fromhex(vector["hex"])) == value


MORE_CAPTURED = [
    (("a", 1), "d64092a16101"),
    ("my_averager.0b0101", "b26d795f61766572616765722e306230313031"),
    (TensorDescriptor((None, 16), "torch.float32", device_type="cpu"), None),
    (
        DictionaryValue(
            5, 2000.25, (("sub", b"\xa2v1", 1000.5), (b"peer", b"\xc3", 2000.25), (("t", 1), b"\x03", 1500.0))
        ),
        None,
    ),
    (1.5, "cb3ff8000000000000"),
    ({"a": [1, (2, b"x")], b"k": None}, None),
]


@pytest.mark.parametrize(("value", "hexed"), MORE_CAPTURED)
def test_more_values(value, hexed):
    packed = pack(value)
    if hexed:
        assert packed.hex() == hexed
    assert unpack(packed) == value


def test_captured_server_description():
    """The answer of a stock expert server to rpc_info."""
    schema = unpack(
        bytes.fromhex(
            "83ae666f72776172645f736368656d61c7844092c77f4091c77b5188a473697a65c7034092c010a56474797065ad746f7263"
            "682e666c6f61743332a66c61796f7574ad746f7263682e73747269646564ad72657175697265735f67726164c2aa70696e5f"
            "6d656d6f7279c2ab636f6d7072657373696f6e00ab6465766963655f74797065a3637075ac6465766963655f696e646578c0"
            "80ae6f7574707574735f736368656d61c77b5188a473697a65c7034092c010a56474797065ad746f7263682e666c6f617433"
            "32a66c61796f7574ad746f7263682e73747269646564ad72657175697265735f67726164c3aa70696e5f6d656d6f7279c2ab"
            "636f6d7072657373696f6e00ab6465766963655f74797065a3637075ac6465766963655f696e646578c0ad6b6579776f7264"
            "5f6e616d6573d44090"
        )
    )
    described = TensorDescriptor((None, 16), "torch.float32", device_type="cpu")
    assert schema["forward_schema"] == ((described,), {})
    assert schema["outputs_schema"].requires_grad is True
    assert schema["keyword_names"] == ()
    assert len(pack(schema)) == 309


def test_captured_expert_record():
    peer = b"12D3KooW".ljust(52, b"x")
    inner = bytes.fromhex("c74640 92 ae") + b"ffn_expert.3.7" + bytes.fromhex("d934") + peer
    record = bytes.fromhex("c76a50 93 cb7ff0000000000000 cb41dac0d04be86a77 91 93 07 c449") + inner
    value = unpack(record + bytes.fromhex("cb41dac0d04be86a77"))
    ((subkey, found, expiration),) = value.entries
    assert (value.maxsize, subkey, expiration) == (INF, 7, value.latest_expiration)
    assert unpack(found) == ("ffn_expert.3.7", peer.decode())
    assert pack(value)[:3].hex() == "c76a50"


def test_unknown_extension_gives_its_bytes():
    assert unpack(msgpack.packb(msgpack.ExtType(0x33, b"abc"))) == b"abc"
    assert unpack(bytes.fromhex("d6ff 00000000")) == msgpack.Timestamp(0)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1),
        np.int64(1),
        np.float64(1),
        Text("a"),
        collections.OrderedDict(a=1),
        {1, 2},
        object(),
        1j,
    ],
)
def test_pack_refuses_what_is_not_plain(value):
    with pytest.raises(TypeError):
        pack(value)
    with pytest.raises(TypeError):
        pack([(value,)])


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(OverflowError):
        pack(2**64)
    deep: object = ()
    for _ in range(10_000):
        deep = (deep,)
    with pytest.raises(ValueError, match="nested"):
        pack(deep)


@pytest.mark.parametrize(
    ("hexed", "complaint"),
    [
        ("", "cut short"),
        ("c1", "never uses"),
        ("92c1", "announces 2 items in 1"),
        ("9201", "announces 2 items in 1"),
        ("920101 01", "1 bytes follow"),
        ("a261", "cut short"),
        ("a2ff61", "does not decode"),
        ("c5ff", "cut short"),
        ("dc", "cut short"),
        ("ddffffffff", "announces 4294967295 items in 0"),
        ("dfffffffff", "announces 8589934590 items"),
        ("8101c0", "does not decode"),
        ("8191a161c0", "does not decode"),
        ("81d4409001", "does not decode"),
        ("d440", "cut short in the extension"),
        ("d4409001", "1 bytes follow the value"),
        ("92d540900101", "1 bytes follow the value in an extension"),
        ("d5409001", "1 bytes follow the value in an extension"),
        ("d44001", "tuple is made of int"),
        ("d54081a1", "announces 2 items in 1"),
        ("c70040", "cut short"),
        ("d6ff0000", "cut short in the extension"),
        ("d5ff0000", "does not decode"),
        ("d8ff" + "ff" * 16, "does not decode"),
        ("d45090", "dictionary value: not a list of 3"),
        ("c70450 93c0c0c0", "entries are no list"),
        ("c70550 9300009101", "an entry is not a list of 3"),
        ("c70850 9300009193 01 02 03", "the value of an entry is int"),
        ("c70950 9300009193 90 c400 03", "subkey list is not hashable"),
        ("c70950 9300009193 01 c400 a0", "expiration is no number: ''"),
        ("c70450 93c30090", "maxsize is no number: True"),
        ("c70c50 9300cb7ff800000000000090", "latest_expiration is no number: nan"),
        ("d45190", "tensor descriptor: not a map"),
        ("d45180", "tensor descriptor: size is absent"),
    ],
)
def test_bad_bytes(hexed, complaint):
    with pytest.raises(RemoteError, match=f"^metadata: .*{complaint}"):
        unpack(bytes.fromhex(hexed), name="metadata")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 3),
        ("size", (-1,)),
        ("size", ("a",)),
        ("size", (True,)),
        ("dtype", 5),
        ("layout", b"x"),
        ("requires_grad", 1),
        ("pin_memory", None),
        ("compression", True),
        ("compression", 1.5),
        ("device_type", 1),
        ("device_index", "a"),
    ],
)
def test_bad_descriptor_names_the_field(field, value):
    fields = {
        "size": (None, 4),
        "dtype": None,
        "layout": None,
        "requires_grad": False,
        "pin_memory": False,
        "compression": 0,
        "device_type": None,
        "device_index": None,
        "a field of tomorrow": 1,
    }
    assert unpack(pack(msgpack.ExtType(0x51, pack(fields)))).size == (None, 4)
    fields[field] = value
    with pytest.raises(RemoteError, match=f"tensor descriptor: {field} "):
        unpack(pack(msgpack.ExtType(0x51, pack(fields))))
    del fields[field]
    with pytest.raises(RemoteError, match=f"tensor descriptor: {field} is absent"):
        unpack(pack(msgpack.ExtType(0x51, pack(fields))))


def deep_lists(n):
    return b"\x91" * n + b"\x90"


def deep_tuples(n):
    packed = b"\x90"
    for _ in range(n):
        packed = b"\x91" + pack(msgpack.ExtType(0x40, packed))
    return packed


def deep_maps(n):
    return b"\x81\xa0" * n + b"\x80"


@pytest.mark.parametrize("nest", [deep_lists, deep_tuples, deep_maps])
def test_nesting(nest):
    unpack(nest(20))
    for depth in (100, 600, 1500, 10_000):
        with pytest.raises(RemoteError, match=r"nested more than 64 deep|extensions in extensions make"):
            unpack(nest(depth))


def test_nested_dictionary_values():
    packed = pack(None)
    for _ in range(500):
        body = b"\x93\x00\x00\x91\x93" + packed + b"\xc4\x00\x00"
        packed = pack(msgpack.ExtType(0x50, body))
    with pytest.raises(RemoteError, match=r"nested more than 64 deep|extensions in extensions make"):
        unpack(packed)


def test_long_values_in_many_extensions_are_not_copied_for_each():
    packed = pack(bytes(1 << 20))
    depth = 0
    tracemalloc.start()
    try:
        while depth < 7:
            packed = pack(msgpack.ExtType(0x40, b"\x91" + packed))
            depth += 1
        unpack(packed)
        while depth < 60:
            packed = pack(msgpack.ExtType(0x40, b"\x91" + packed))
            depth += 1
        tracemalloc.reset_peak()
        with pytest.raises(RemoteError, match="extensions in extensions make"):
            unpack(packed)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_limits():
    unpack(deep_lists(63))
    with pytest.raises(RemoteError, match="nested more than 64 deep"):
        unpack(deep_lists(64))
    assert len(unpack(pack([0] * 100), max_items=100)) == 100
    with pytest.raises(RemoteError, match="more than 100 items"):
        unpack(pack([0] * 101), max_items=100)
    with pytest.raises(RemoteError, match="more than 3 items"):
        unpack(pack([{"a": 1}, 2]), max_items=3)
    with pytest.raises(RemoteError, match="at most 10 are accepted"):
        unpack(bytes(11), max_bytes=10)


def test_announced_counts_allocate_nothing():
    """A thousand nested arrays that each announce as many items as there are bytes."""
    header = b"\xdd\x00\x01\x00\x00"
    started = time.perf_counter()
    with pytest.raises(RemoteError, match="more than"):
        unpack(header * 1000 + bytes(70_000))
    assert time.perf_counter() - started < 1


scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=10),
    st.binary(max_size=10),
)
value = st.recursive(
    scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.binary(max_size=5)), inner, max_size=4),
    ),
    max_leaves=12,
)


@QUICK
@given(value)
def test_round_trip(original):
    assert unpack(pack(original)) == original


@QUICK
@given(st.one_of(st.binary(max_size=80), value.map(pack)), st.integers(0, 79), st.integers(0, 255))
def test_any_bytes_decode_or_raise_remote_error(data, position, byte):
    broken = bytearray(data)
    if broken:
        broken[position % len(broken)] = byte
    try:
        unpack(bytes(broken))
    except RemoteError as e:
        assert str(e).startswith("msgpack value: ")  # noqa: PT017 - not raising is fine too


def test_integer_maxsize_stays_one():
    assert math.isinf(unpack(pack(DictionaryValue(INF, 1.0, ()))).maxsize)
    assert pack(DictionaryValue(5, 0.0, ()))[4] == 5
