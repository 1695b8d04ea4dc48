"""The simulated KwaaiNet peer, written apart from the package's own stack, lies in a folder of its own."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kwaainet"))
