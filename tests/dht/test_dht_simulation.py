"""The simulation of large networks, on a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def figures(output: Path) -> dict[str, dict[str, Any]]:
    """Run it in a process of its own: it fixes the order in which trio runs tasks."""
    script = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path\n"
        "from bench.dht_network import run_reproducibly; from bench.dht_simulation import simulate\n"
        "result = run_reproducibly(simulate, 30, 0.5, 3, seed=3)\n"
        "Path(sys.argv[1]).write_text(json.dumps({name: asdict(row) for name, row in result.items()}))"
    )
    subprocess.run([sys.executable, "-c", script, output], check=True, cwd=ROOT, timeout=200)
    result: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return result


@pytest.mark.slow
def test_a_seed_gives_the_same_figures_again_and_everything_is_found(tmp_path: Path) -> None:
    first = figures(tmp_path / "first.json")
    assert list(first) == ["quiet", "churn", "after"]
    for row in first.values():
        assert row["found"] == 1.0
        assert 1 <= row["hops"] <= row["messages"] < 30
        assert 0 < row["seconds"] < row["slowest"]
    assert figures(tmp_path / "second.json") == first
