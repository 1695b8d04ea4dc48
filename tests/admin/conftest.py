"""Nodes come from the helpers of tests/node."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "node"))
