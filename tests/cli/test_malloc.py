"""What a process does with memory that it has freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from kwaainet_bridge.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    for block in [bytearray(512 * 1024) for _ in range(16)]:
        block[::4096] = bytes(128)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator alone can be told")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        run = [sys.executable, "-c", _FAULTS, how]
        return int(subprocess.run(run, capture_output=True, check=True, text=True).stdout)

    assert faults("kept") * 10 < faults("given back")
