"""The reader of KwaaiNet's msgpack against the msgpack library, which writes each value on its own here."""

from __future__ import annotations

import enum
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge.compression.codec import TILE
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.kwaai_msgpack import Cursor, map_parts, required, variant_parts
from kwaainet_bridge.wire.kwaai_octets import read_octets


class Colour(enum.StrEnum):
    RED = "Red"
    GREEN = "Green"


def read(method: str, data: bytes, **arguments):
    cursor = Cursor(data)
    value = getattr(cursor, method)("field", **arguments)
    cursor.end()
    return value


# every form of an integer, the shortest or not
@pytest.mark.parametrize(
    ("hexed", "value"),
    [
        ("05", 5),
        ("7f", 127),
        ("cc05", 5),
        ("ccff", 255),
        ("cd0005", 5),
        ("cdffff", 65535),
        ("ce00010000", 65536),
        ("cfffffffffffffffff", 2**64 - 1),
        ("d07f", 127),
        ("d17fff", 32767),
        ("d20000ffff", 65535),
        ("d37fffffffffffffff", 2**63 - 1),
    ],
)
def test_integers(hexed, value):
    assert read("u64", bytes.fromhex(hexed)) == value
    for method, bits in (("u32", 32), ("u16", 16)):
        if value < 1 << bits:
            assert read(method, bytes.fromhex(hexed)) == value
        else:
            with pytest.raises(RemoteError, match=f"field is {value}, which is not within {bits} bits"):
                read(method, bytes.fromhex(hexed))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (-1, "-1, which is not within"),
        (-(2**63), "-9223372036854775808, which"),
        (1.0, "a float, not an integer"),
        (True, "a boolean, not"),
        (None, "nil, not"),
        ("5", "text, not"),
        (b"5", "bytes, not"),
        ([5], "an array, not"),
        ({"a": 5}, "a map, not"),
        (msgpack.ExtType(5, b"12345678"), "an extension, not"),
        (msgpack.ExtType(5, b"123"), "an extension, not"),
    ],
)
def test_what_is_no_number(value, what):
    with pytest.raises(RemoteError, match=f"field is {what}"):
        read("u64", msgpack.packb(value))


def test_reserved_and_cut_bytes():
    with pytest.raises(RemoteError, match="field is a byte that msgpack never uses"):
        read("u64", b"\xc1")
    for hexed in ("", "cd00", "cf"):
        with pytest.raises(RemoteError, match=r"field ends (early|after)"):
            read("u64", bytes.fromhex(hexed))
    with pytest.raises(RemoteError, match="2 bytes follow the message"):
        read("u64", b"\x05\x00\x00")


@pytest.mark.parametrize("length", [0, 31, 32, 255, 256, 65536])
def test_text(length):
    assert read("text", msgpack.packb("x" * length), max_bytes=length) == "x" * length
    if length:
        with pytest.raises(RemoteError, match=f"field has {length} bytes, at most {length - 1}"):
            read("text", msgpack.packb("x" * length), max_bytes=length - 1)
        with pytest.raises(RemoteError, match="field ends after"):
            read("text", msgpack.packb("x" * length)[:-1], max_bytes=length)


def test_text_is_utf8_and_no_bytes():
    with pytest.raises(RemoteError, match="field is not UTF-8"):
        read("text", b"\xa1\xff", max_bytes=9)
    with pytest.raises(RemoteError, match="field is bytes, not text"):
        read("text", msgpack.packb(b"a"), max_bytes=9)


def test_texts_for_people_are_cut():
    assert read("beginning", msgpack.packb("é" * 5000)) == "é" * 1000
    assert read("beginning", b"\xa2\xffa") == "�a"
    with pytest.raises(RemoteError, match="field is an integer, not text"):
        read("beginning", b"\x05")


def test_shapes():
    assert read("shape", msgpack.packb([1, 2**32 - 1, 0])) == (1, 2**32 - 1, 0)
    assert read("shape", msgpack.packb([1] * 16)) == (1,) * 16
    with pytest.raises(RemoteError, match="field has 17 dimensions, at most 16"):
        read("shape", msgpack.packb([1] * 17))
    with pytest.raises(RemoteError, match="field has 4294967295 dimensions"):
        read("shape", b"\xdd\xff\xff\xff\xff")
    for bad in ([2**32], [-1], ["1"], [None], 5):
        with pytest.raises(RemoteError, match="field is"):
            read("shape", msgpack.packb(bad))


def test_optional():
    for value in (None, 5):
        cursor = Cursor(msgpack.packb(value))
        assert cursor.optional("field", cursor.u64) == value
    cursor = Cursor(b"")
    with pytest.raises(RemoteError, match="field ends early"):
        cursor.optional("field", cursor.u64)


def test_variants():
    assert read("variant", msgpack.packb("Red")) == ("Red", False)
    assert read("choice", msgpack.packb("Red"), among=Colour) is Colour.RED
    assert read("choice", msgpack.packb({"Green": None}), among=Colour) is Colour.GREEN
    for value, complaint in [
        ({}, "a map of 0 pairs, not one variant"),
        ({"Red": None, "Green": None}, "a map of 2 pairs, not one variant"),
        (5, "an integer, not one variant"),
        ({5: None}, "an integer, not text"),
        ("x" * 65, "field has 65 bytes, at most 64"),
        ({"x" * 65: None}, "field has 65 bytes, at most 64"),
        ("Blue", "'Blue', none of Red, Green"),
        ({"Blue": {}}, "'Blue', none of Red, Green"),
        ({"Red": 1}, "field is an integer, not nil"),
    ]:
        with pytest.raises(RemoteError, match=complaint):
            read("choice", msgpack.packb(value), among=Colour)


def entries(data: bytes, *keys: str):
    cursor = Cursor(data)
    found = cursor.entries("the message", dict.fromkeys(keys, cursor.u64))
    cursor.end()
    return found


def test_entries_in_any_order_and_unknown_ones():
    unknown = {
        "new": [1, {"a": [None]}],
        "x" * 300: b"y" * 70000,
        "": msgpack.ExtType(0x40, b"\x91\x91"),
        "z": 1.5,
    }
    for sent in ({"a": 1, "b": 2, **unknown}, {**unknown, "b": 2, "a": 1}):
        assert entries(msgpack.packb(sent), "a", "b", "c") == {"a": 1, "b": 2}
    assert required({"a": 1, "b": 2}, "b", "a") == [2, 1]
    with pytest.raises(RemoteError, match="c is absent"):
        required({"a": 1, "b": 2}, "a", "c")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (msgpack.packb([1]), "the message is an array, not a map"),
        (b"\x82\xa1a\x01\xa1a\x02", "a comes twice"),
        (msgpack.packb({5: 1}), "a key of the message is an integer, not text"),
        (msgpack.packb({b"a": 1}), "a key of the message is bytes, not text"),
        (msgpack.packb({"a": "x"}), "a is text, not an integer"),
        (msgpack.packb({str(i): i for i in range(65)}), "65 entries, at most 64"),
        (b"\xdf\xff\xff\xff\xff", "4294967295 entries"),
        (b"\x82\xa1a\x01", "a key of the message ends early"),
        (b"\x81\xa1a", "a ends early"),
        (b"\x81\xa5a", "a key of the message ends after 1 of 5"),
        (b"\x81\xa1b\xc1", "an entry of an unknown key: byte 3 is 0xc1"),
        (b"\x81\xa1b\xdd\xff\xff\xff\xff", "announces 4294967295 items"),
        (b"\x81\xa1b" + b"\x91" * 70 + b"\x90", "nested more than 64 deep"),
        (b"\x81\xa1b\xc6\xff\xff\xff\xff", "cut short"),
        (msgpack.packb({"a": 1}) + b"\x00", "1 bytes follow"),
    ],
)
def test_bad_entries(data, complaint):
    with pytest.raises(RemoteError, match=complaint):
        entries(data, "a")


def test_skipped_entries_share_one_bound():
    data = msgpack.packb({str(i): [0] * 30_000 for i in range(2)})
    assert entries(data, "a") == {}
    with pytest.raises(RemoteError, match="unknown key: more than 5536 items"):
        entries(msgpack.packb({str(i): [0] * 30_000 for i in range(3)}), "a")


def test_written_maps_are_the_librarys():
    values = {"a": 2**64 - 1, "b": "text", "c": None, "d": (1, 300), "e": {"f": 1}}
    expected = msgpack.packb(values | {"d": [1, 300]})
    assert b"".join(map_parts(values)) == expected
    assert b"".join(variant_parts("V", values)) == b"\x81\xa1V" + expected
    for length in (0, 255, 256, 65535, 65536):
        sent = {"a": 1, "data": memoryview(bytes(length)), "z": None}
        parts = map_parts(sent)
        assert parts[1] is sent["data"]
        assert b"".join(parts) == msgpack.packb(sent | {"data": bytes(length)})


# --- bytes as integers ---------------------------------------------------------------------------------------


@QUICK
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([0, 0x7F, 0x80, 0xCB, 0xCC, 0xCD, 0xFF]), max_size=300).map(bytes),
    )
)
def test_octets_in_both_forms(content):
    assert read("octets", msgpack.packb(content)) == content
    as_integers = msgpack.packb(list(content))
    assert read("octets", as_integers) == content
    all_wide = b"\xdc" + len(content).to_bytes(2, "big") + b"".join(b"\xcc%c" % b for b in content)
    assert read("octets", all_wide) == content
    for cut in range(1, min(len(content), 3)):
        with pytest.raises(RemoteError, match=r"field (ends|announces)"):
            read("octets", as_integers[:-cut])


@pytest.mark.parametrize("filler", [b"\x01", b"\xcc", b"\xff"])
@pytest.mark.parametrize("offset", range(-2, 3))
def test_octets_across_tiles(filler, offset):
    content = filler * (TILE + offset) + b"\xcc\xcc\xcc\x05\xff" * 3
    assert read("octets", msgpack.packb(list(content))) == content


@pytest.mark.parametrize(
    ("hexed", "complaint"),
    [
        ("92 01 ff", "item 1 begins with 0xff"),
        ("92 01 e0", "item 1 begins with 0xe0"),
        ("92 ccff cd0005", "item 1 begins with 0xcd"),
        ("93 01 cccc d005", "item 2 begins with 0xd0"),
        ("91 c0", "item 0 begins with 0xc0"),
        ("91 c3", "item 0 begins with 0xc3"),
        ("91 91 01", "item 0 begins with 0x91"),
        ("92 01", "field announces 2 items in 1 bytes"),
        ("92 01 cc", "field ends after 1 of 2 items"),
        ("92 cccc", "field ends after 1 of 2 items"),
        ("91 cc", "field ends after 0 of 1 items"),
        ("dd ffffffff 00", "field announces 4294967295 items in 1 bytes"),
        ("c6 ffffffff 00", "field ends after 1 of 4294967295 bytes"),
        ("a0", "field is text, neither bytes nor an array of them"),
        ("c0", "field is nil, neither"),
        ("80", "field is a map, neither"),
    ],
)
def test_bad_octets(hexed, complaint):
    with pytest.raises(RemoteError, match=complaint):
        read("octets", bytes.fromhex(hexed))


def test_octets_end_where_their_items_do():
    data = memoryview(b"\x01\xcc\xff\x02\xcc\xcc\xcc")
    assert [read_octets(data, 0, n, "x")[1] for n in range(5)] == [0, 1, 3, 4, 6]
    assert bytes(read_octets(data, 3, 2, "x")[0]) == b"\x02\xcc"


def test_octets_are_views_or_bounded_copies():
    data = msgpack.packb(bytes(1 << 20))
    assert read("octets", data).obj is data
    packed = msgpack.packb([255] * (1 << 20))
    tracemalloc.start()
    try:
        read("octets", packed)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
