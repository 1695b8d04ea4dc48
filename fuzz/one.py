"""One target under libFuzzer: ``python -m fuzz.one TARGET [libFuzzer options] [corpus folder or inputs]``.

With files instead of a folder it runs those inputs once, which reproduces a crash.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Final

# atheris 3.0.0 never frees the result of an instrumented comparison of tensors. Encoding by table compares large
# ones and is therefore left out of the instrumentation, though not of the run.

HEADROOM_BYTES: Final = 1 << 30
"""Address space that a target may take beyond what the process has when it starts. tracemalloc does not see
torch's memory; this makes a tensor sized by an unchecked number fail."""


def _limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    import atheris  # type: ignore[import-untyped]  # it has no annotations

    with atheris.instrument_imports(
        include=["kwaainet_bridge", "multiaddr", "base58"], exclude=["kwaainet_bridge.compression.lookup"]
    ):
        from fuzz import limits
        from fuzz.targets import TARGETS
    import torch

    torch.set_num_threads(1)
    name = sys.argv.pop(1)
    target = TARGETS[name]
    atheris.Setup(sys.argv, lambda data: limits.check(target, data))
    _limit_address_space()
    atheris.Fuzz()


if __name__ == "__main__":
    main()
