"""The C library's allocator, told to keep what it has.

glibc gives freed memory at the heap's top back to the kernel beyond 128 KiB, and large blocks always. A process that
moves tensors in pieces of half a megabyte then gets every piece anew, page by page: on virtual machines that costs
more than encrypting it.
"""

from __future__ import annotations

import ctypes
from typing import Final

from kwaainet_bridge import defaults

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> bool:
    """Have the whole process keep up to ``defaults.KEPT_FREE_BYTES`` of freed memory for what it needs next.

    A decision for programs, not for libraries. Returns whether the allocator is one that can be told: glibc's.
    Source of the numbers: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, defaults.KEPT_FREE_BYTES)
    return bool(kept and mallopt(_M_MMAP_THRESHOLD, defaults.KEPT_FREE_BYTES // 2))
