"""The golden choices of blocks, and moves to others, are those that the installed stock Petals makes."""

from __future__ import annotations

import json
from pathlib import Path

from stock_swarm import START_SECONDS, StockEnvironment

VECTORS = Path(__file__).parents[1] / "vectors"


def test_stock_petals_chooses_and_moves_as_recorded(stock: StockEnvironment) -> None:
    choices = json.loads((VECTORS / "petals-block-choice.json").read_text())
    moves = json.loads((VECTORS / "petals-rebalancing.json").read_text())
    with stock.script("block_choice.py", "1", str(len(choices)), str(len(moves))) as driver:
        told = driver.event("ready", within=START_SECONDS)
    assert told["cases"] == choices
    assert told["moves"] == moves
