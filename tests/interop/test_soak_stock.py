"""The first half minute of the soak: people of both networks and of the endpoint come and go, and all is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stock_swarm import ROOT, StockEnvironment

from bench.soak import FLAT, WARM_SECONDS, judge_memory

SECONDS = 30


@pytest.mark.slow
def test_texts_are_exact_and_the_node_counts_what_its_clients_count(
    stock: StockEnvironment, tmp_path: Path
) -> None:
    # in a process of its own: httpx leaves the generators of streams that are hung up on to the collector
    options = ("--minutes", str(SECONDS / 60), "--kill-every", "8", "--work", tmp_path)
    result = subprocess.run([sys.executable, "-m", "bench.soak", *options], cwd=ROOT, check=False)
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["wrong"] == []
    assert result.returncode == 0
    for network in ("petals", "kwaainet"):
        assert report[network]["texts"] > report[network]["left"] > 0
    assert report["petals"]["passes"] > 0
    assert report["events"]["status"] >= SECONDS


def memory_of(warm: list[float]) -> dict[str, float]:
    """What is found where it rose until the node was warm, and was so much from then on, minute by minute."""
    rising = [{"at": 100.0 + at, "memory": at / WARM_SECONDS} for at in range(0, int(WARM_SECONDS), 60)]
    then = [{"at": 100.0 + WARM_SECONDS + 60 * i, "memory": value} for i, value in enumerate(warm)]
    return judge_memory(rising + then)


def test_memory_is_judged_once_the_node_is_warm() -> None:
    assert memory_of([1.0] * 12) == {"most": 1.0, "early": 1.0, "late": 1.0}
    grown = memory_of([1.0 + 0.005 * minute for minute in range(12)])
    assert grown["late"] > FLAT * grown["early"]
    assert set(memory_of([])) == {"most"}
