"""Nodes come from the helpers of tests/node, clients of their admin side from those of tests/admin."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("node", "admin"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
