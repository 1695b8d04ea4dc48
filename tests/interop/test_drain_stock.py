"""A stock Petals client computes with a node of ours while that is told to drain: it loses no step."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from our_nodes import start_node, wait_until_ready
from stock_swarm import ROOT, START_SECONDS, StockEnvironment

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "vectors" / "petals-tiny-llama" / "model"
PREFIX = "tiny-llama-hf"
TOKENS = 600
"""Steps of one token: some seconds of a session."""


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a command of ours tells of the node there."""
    command = [sys.executable, "-m", "kwaainet_bridge", *arguments, "-c", str(folder / "node.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_session_that_ends_in_time_loses_no_step(stock: StockEnvironment, tmp_path: Path) -> None:
    with stock.script("petals_client.py") as client, start_node(tmp_path, "bootstrap") as bootstrap:
        address = wait_until_ready(bootstrap)
        with start_node(tmp_path, "node", model=MODEL, prefix=PREFIX, peers=[address]) as node:
            wait_until_ready(node)
            client.event("ready", within=START_SECONDS)
            client.ask(
                "load", key="tiny", model=str(MODEL), prefix=PREFIX, peers=[address], within=START_SECONDS
            )

            def compute() -> dict[str, Any]:
                shape, steps = [1, TOKENS, 64], [1] * TOKENS
                found: dict[str, Any] = client.ask(
                    "run_blocks", key="tiny", shape=shape, seed=3, steps=steps, within=120
                )
                return found

            with ThreadPoolExecutor(1) as beside:
                computing = beside.submit(compute)
                while not (served := ask(tmp_path, "status")["networks"]["petals"])["sessions"]:
                    assert not computing.done()
                assert served["served"]["steps"] < TOKENS
                assert ask(tmp_path, "drain")["sessions"] == 1
                assert not computing.done()
                found = computing.result()
            assert node.wait(30) == 0
        log = (tmp_path / "node.log").read_text()
        assert "asked to drain" in log
        assert "sessions are cut off" not in log
    passed, stepped = torch.tensor(found["passed"]), torch.tensor(found["stepped"])
    assert stepped.shape == (1, TOKENS, 64)
    assert (stepped - passed).norm() < 1e-4 * passed.norm()
