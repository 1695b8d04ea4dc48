"""The simulated KwaaiNet peer, written apart from the package's own stack, lies in a folder of its own; so do the
pairs of hosts, the encoder by hand of tensors between bridges, and the small models of all families."""

import sys
from pathlib import Path

for folder in ("kwaainet", "rpc", "wire", "engine"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
