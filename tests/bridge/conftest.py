"""Tests of both networks at once use the simulated KwaaiNet peer, and whole nodes, also as processes."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("kwaainet", "node", "interop"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
