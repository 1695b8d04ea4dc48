from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.dht import DhtId

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())["dhtid"]


@pytest.mark.parametrize(
    ("key", "digest"),
    [
        # None is no key for stock peers: they take it for "any id" and draw one
        *((ast.literal_eval(vector["py"]), vector["hex"]) for vector in GOLDEN if vector["py"] != "None"),
        ("key1", "ce27c561a2627a439cecb58acff4927706cc6418"),
        (("a", 1), "edd01de4b5be93353047fae489cc36b2e8f20fb1"),
        ("my_averager.0b0101", "c5b668d4fbc04b598e527fd9a2557af877716938"),
    ],
)
def test_ids_of_keys_equal_those_of_stock_peers(key: object, digest: str) -> None:
    assert str(DhtId.of(key)) == digest
    assert DhtId.of(key).to_bytes() == bytes.fromhex(digest)


def test_short_ids_are_small_numbers_and_long_ones_are_refused() -> None:
    assert DhtId.from_bytes(b"\x01\x02", field="keys") == DhtId(258)
    assert DhtId.from_bytes(b"", field="keys") == DhtId(0)
    assert DhtId.from_bytes(b"\xff" * 20, field="keys") == 2**160 - 1
    with pytest.raises(RemoteError, match=r"keys.*21"):
        DhtId.from_bytes(b"\x00" * 21, field="keys")


def test_random_ids_follow_their_source() -> None:
    assert DhtId.random(random.Random(1)) == DhtId.random(random.Random(1))
    assert DhtId.random(random.Random(1)) != DhtId.random(random.Random(2))


def test_numbers_outside_the_space_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="160 bits"):
        DhtId(2**160)
