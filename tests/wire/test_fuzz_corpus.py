"""Every fuzz target once over its seeds and over the inputs that broke one before; ``make fuzz`` does the rest."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

sys.path.insert(0, str(Path(__file__).parents[2]))  # the harness lies beside the package, not in it

from fuzz import limits, seeds
from fuzz.targets import TARGETS
from kwaainet_bridge.errors import RemoteError


@pytest.fixture(autouse=True)
def _no_tracing_afterwards():
    yield
    tracemalloc.stop()


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    for name, data in seeds.seeds():
        found[name].append(data)
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name, corpus):
    accepted = 0
    for data in corpus[name]:
        limits.check(TARGETS[name], data)
        try:
            TARGETS[name](data)
        except RemoteError:
            continue
        accepted += 1
    assert accepted > 0  # a corpus of nothing but refusals would lead the fuzzer nowhere


@pytest.mark.parametrize("name", TARGETS)
def test_cut_and_broken_seeds(name, corpus):
    for data in sorted(set(corpus[name]), key=len)[:8]:
        step = max(1, len(data) // 24)
        for at in range(0, len(data), step):
            limits.check(TARGETS[name], data[:at])
            limits.check(TARGETS[name], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])


@pytest.mark.parametrize("name", TARGETS)
@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes(name, data):
    limits.check(TARGETS[name], data)


@pytest.mark.parametrize(
    ("name", "path"), [pytest.param(n, p, id=f"{n}-{p.name}") for n, p in seeds.regressions()]
)
def test_past_crashes(name, path):
    limits.check(TARGETS[name], path.read_bytes())


def test_a_broken_decoder_would_be_noticed():
    def greedy(data: bytes) -> None:
        bytearray(64 << 20)

    def verbose(data: bytes) -> None:
        raise RemoteError("x" * 10_000)

    def wrong(data: bytes) -> None:
        raise IndexError("index out of range")

    with pytest.raises(limits.Violation, match="bytes of memory"):
        limits.check(greedy, b"")
    with pytest.raises(limits.Violation, match="10000 characters"):
        limits.check(verbose, b"")
    with pytest.raises(IndexError):
        limits.check(wrong, b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BASE_SECONDS", 0.01)
        with pytest.raises(limits.Violation, match="s for an input"):
            limits.check(lambda _data: sum(range(2_000_000)), b"")
