"""Nodes come from the helpers of tests/node, adapters from those of tests/engine."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("node", "engine"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
