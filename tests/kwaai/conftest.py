"""The simulated KwaaiNet peer, written apart from the package's own stack, lies in a folder of its own; so do the
pairs of hosts, and the encoder by hand of tensors between bridges."""

import sys
from pathlib import Path

for folder in ("kwaainet", "rpc", "wire"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
