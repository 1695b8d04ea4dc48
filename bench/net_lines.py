"""The line protocol of ``tests/interop/stock/lines.py``, for the benchmark's own processes, which run trio."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock"))

from lines import Lines

__all__ = ["Lines", "requests"]


async def requests() -> AsyncIterator[dict[str, Any]]:
    """The commands, one after the other, until stdin ends."""
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        yield json.loads(line)
