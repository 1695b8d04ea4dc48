"""Bytes recorded from hivemind 1.1.12 (its own serialisers, p2pd and bitsandbytes 0.45.5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HIVEMIND: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())
FRAMES: dict[str, bytes] = {
    name: bytes.fromhex(value) for name, value in HIVEMIND["frames"].items() if isinstance(value, str)
}
