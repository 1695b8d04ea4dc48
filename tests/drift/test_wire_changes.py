"""The difference of golden values, and that of stock protobuf messages and ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from wire_changes import leaves, wire_changes

from kwaainet_bridge.wire.pb import dht_pb2, expert_pb2, keys_pb2

STOCK_MESSAGES = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind-messages.json").read_text())


def test_no_change():
    values = {"ids": [{"py": "1", "hex": "00"}], "frames": {"end": "01"}, "sizes": [1, 2]}
    assert wire_changes(values, json.loads(json.dumps(values)), whole=True) == []


def test_a_vector_goes_by_its_name_and_not_by_its_place():
    old = [{"py": "1", "hex": "00"}, {"py": "2", "hex": "01"}]
    assert wire_changes(old, old[1:], whole=False) == []
    assert wire_changes(old, [{"py": "2", "hex": "02"}], whole=False) == ["2 / hex: ~ 01 -> 02"]


def test_a_codec_that_is_refused_now():
    old = {"compression": [{"name": "scalar", "type": "NONE", "pb_hex": "00"}]}
    new = {"compression": [{"name": "scalar", "type": "NONE", "error": "ValueError: no"}]}
    assert wire_changes(old, new, whole=False) == ["compression / scalar NONE / error: + ValueError: no"]


def test_fields_of_a_message():
    old = {"Tensor": {"1": "optional bytes buffer", "2": "repeated int32 size", "3": "optional bool x"}}
    new = {"Tensor": {"1": "optional bytes buffer", "2": "repeated int64 size", "4": "optional bool y"}}
    assert wire_changes(old, new, whole=True) == [
        "Tensor / 2: ~ repeated int32 size -> repeated int64 size",
        "Tensor / 4: + optional bool y",
        "Tensor / 3: - optional bool x",
    ]


@pytest.mark.parametrize(("whole", "count"), [(True, 1), (False, 0)])
def test_what_was_not_made_anew_counts_only_for_a_whole(whole, count):
    assert len(wire_changes({"a": "0", "b": "1"}, {"a": "0"}, whole=whole)) == count


def test_long_values_are_shown_from_the_first_different_byte():
    (line,) = wire_changes({"x": "ab" * 100}, {"x": "ab" * 60 + "cd" * 30}, whole=True)
    assert line.startswith("x: ~ 100 -> 90 bytes, from byte 60: …abababababab")
    assert len(line) < 200


def test_leaves_of_empty_and_plain_lists():
    assert leaves({"a": [], "b": [1, 2], "c": {}}) == {("a",): [], ("b",): [1, 2]}


OURS = [
    ("dht", dht_pb2, ["NodeInfo", "PingRequest", "PingResponse", "StoreRequest", "StoreResponse"]),
    ("dht", dht_pb2, ["FindRequest", "FindResult", "FindResponse"]),
    ("runtime", expert_pb2, ["Tensor", "ExpertUID", "ExpertInfo", "ExpertRequest", "ExpertResponse"]),
    ("crypto", keys_pb2, ["PublicKey", "PrivateKey"]),
]


@pytest.mark.parametrize(
    ("file", "module", "name"), [(file, module, name) for file, module, names in OURS for name in names]
)
def test_our_fields_are_those_of_stock(file, module, name):
    """The same number, count and kind for each field of ours; names are not on the wire."""
    stock = STOCK_MESSAGES[f"{file}.{name}"]
    for field in module.DESCRIPTOR.message_types_by_name[name].fields:
        repeated, kind, _ = stock[str(field.number)].split(" ", 2)
        assert field.is_repeated == (repeated == "repeated"), field.name
        ours = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        assert ours in (("message", "enum") if kind.startswith(".") else (kind,)), field.name
