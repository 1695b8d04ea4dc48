"""The golden choices of blocks are those that the installed stock Petals makes."""

from __future__ import annotations

import json
from pathlib import Path

from stock_swarm import START_SECONDS, StockEnvironment

VECTORS = Path(__file__).parents[1] / "vectors"


def test_stock_petals_chooses_as_recorded(stock: StockEnvironment) -> None:
    recorded = json.loads((VECTORS / "petals-block-choice.json").read_text())
    with stock.script("block_choice.py", "1", str(len(recorded))) as driver:
        assert driver.event("ready", within=START_SECONDS)["cases"] == recorded
