from __future__ import annotations

import math

import pytest

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.dht.values import (
    Found,
    FoundEntry,
    Regular,
    decode,
    dictionary,
    live_part,
    merge,
    read_subkey,
)
from kwaainet_bridge.wire.msgpack import DictionaryValue, pack

A, B = pack("a"), pack("b")


def test_the_later_regular_value_wins_and_a_tie_keeps_ours() -> None:
    assert merge(None, Regular(A, 1.0)) == Regular(A, 1.0)
    assert merge(Regular(A, 1.0), Regular(B, 2.0)) == Regular(B, 2.0)
    assert merge(Regular(A, 2.0), Regular(B, 1.0)) == Regular(A, 2.0)
    assert merge(Regular(A, 1.0), Regular(B, 1.0)) == Regular(A, 1.0)


def test_dictionaries_merge_entry_by_entry() -> None:
    ours = dictionary([("x", A, 1.0), ("y", A, 5.0)])
    theirs = dictionary([("x", B, 2.0), ("y", B, 4.0), ("z", B, 3.0)])
    merged = merge(ours, theirs)
    assert merged == dictionary([("x", B, 2.0), ("y", A, 5.0), ("z", B, 3.0)])


def test_a_value_and_a_dictionary_compete_as_wholes() -> None:
    both = dictionary([("x", A, 1.0), ("y", A, 3.0)])
    assert merge(both, Regular(B, 2.0)) == both
    assert merge(both, Regular(B, 4.0)) == Regular(B, 4.0)
    assert merge(Regular(B, 2.0), both) == both


def test_subkeys_that_python_takes_for_equal_stay_apart() -> None:
    merged = merge(dictionary([(1, A, 1.0)]), dictionary([(True, B, 9.0)]))
    assert isinstance(merged, DictionaryValue)
    assert [entry[1] for entry in merged.entries] == [A, B]


def test_merging_does_not_grow_without_bound() -> None:
    half = bytes(defaults.DHT_MAX_RECORD_BYTES // 2)
    merged = merge(dictionary([("x", half, 1.0)]), dictionary([("y", half, 2.0), ("z", A, 2.0)]))
    assert isinstance(merged, DictionaryValue)
    assert [entry[0] for entry in merged.entries] == ["x", "z"]


@pytest.mark.parametrize("flood_first", [True, False])
def test_a_replica_as_large_as_can_be_does_not_drive_out_another(flood_first: bool) -> None:
    flood = dictionary([(n, bytes(1000), 9.0) for n in range(3000)])
    honest = dictionary([(f"peer {n}", bytes(300), 1.0) for n in range(500)])
    merged = merge(flood, honest) if flood_first else merge(honest, flood)
    few = dictionary([("one", bytes(10), 1.0)])
    merged = merge(merged, few)
    for n in range(5):
        merged = merge(merged, dictionary([((n, m), bytes(1000), 9.0) for m in range(3000)]))
    assert isinstance(merged, DictionaryValue)
    subkeys = {entry[0] for entry in merged.entries}
    assert {"one", *(entry[0] for entry in honest.entries)} <= subkeys
    assert sum(len(entry[1]) for entry in merged.entries) <= defaults.DHT_MAX_RECORD_BYTES


def test_only_what_has_not_expired_is_live() -> None:
    assert live_part(Regular(A, 10.0), 10.0) == Regular(A, 10.0)
    assert live_part(Regular(A, 10.0), 10.5) is None
    assert live_part(Regular(A, math.nan), 0.0) is None
    assert live_part(dictionary([("x", A, 1.0), ("y", B, 2.0)]), 1.5) == dictionary([("y", B, 2.0)])
    assert live_part(dictionary([("x", A, 1.0)]), 1.5) is None
    # an announced expiration that no entry has does not count
    assert live_part(DictionaryValue(math.inf, 9.0, (("x", A, 2.0),)), 1.0) == dictionary([("x", A, 2.0)])


def test_values_are_unpacked_for_the_reader() -> None:
    assert decode(Regular(pack({"a": (1, 2)}), 7.0), key="k") == Found(
        {"a": (1, 2)}, 7.0, is_dictionary=False
    )
    found = decode(dictionary([("x", A, 1.0), (("t", 1), B, 2.0)]), key="k")
    assert found == Found(
        {"x": FoundEntry("a", 1.0), ("t", 1): FoundEntry("b", 2.0)}, 2.0, is_dictionary=True
    )


@pytest.mark.parametrize("bad", [b"", b"\xc1", b"\x81", A + A, b"\x91" * 10_000 + b"\x00"])
def test_values_that_are_not_msgpack_are_left_out(bad: bytes) -> None:
    assert decode(Regular(bad, 1.0), key="k") is None
    assert decode(dictionary([("x", bad, 1.0)]), key="k") is None
    found = decode(dictionary([("x", bad, 5.0), ("y", A, 1.0)]), key="k")
    assert found == Found({"y": FoundEntry("a", 1.0)}, 1.0, is_dictionary=True)


def test_subkeys_that_can_be_read() -> None:
    for subkey in ("sub", b"sub", 5, 1.5, ("t", 1), True):
        assert read_subkey(pack(subkey)) == subkey


@pytest.mark.parametrize(
    "bad",
    [
        pack(["a"]),  # stock fails on reading a dictionary with an unhashable key
        pack({"a": 1}),
        pack((["a"],)),
        pack("x" * defaults.DHT_MAX_SUBKEY_BYTES),
        pack(tuple(range(defaults.DHT_MAX_SUBKEY_ITEMS + 1))),
        b"\xd4\x40" * 20 + b"\xc0",
        b"\xc1",
        A + A,
    ],
)
def test_subkeys_that_cannot_be_keys_are_refused(bad: bytes) -> None:
    with pytest.raises(RemoteError, match="subkeys"):
        read_subkey(bad)
