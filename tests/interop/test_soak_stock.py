"""The first half minute of the soak: people of both networks and of the endpoint come and go, and all is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stock_swarm import ROOT, StockEnvironment

pytestmark = pytest.mark.slow

SECONDS = 30


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
