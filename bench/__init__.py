"""Benchmarks. They start peers with the code of the interop tests and, like those, need ``make peers``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop"))
