"""Where tensors are coded: small ones on the event loop, large ones in a thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType

T = TypeVar("T")

_QUICK: Final = (CompressionType.NONE, CompressionType.FLOAT16)

_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("threads that code tensors")


async def coded(code: Callable[[], T], size: int, compression: int) -> T:
    """What ``code`` returns or raises; it handles ``size`` bytes. Cancelled: it goes on to its end first."""
    quick = compression in _QUICK
    if size <= (defaults.AVERAGING_INLINE_BYTES if quick else defaults.INLINE_COMPRESSED_BYTES):
        return code()
    return await trio.to_thread.run_sync(code, limiter=_limiter())


def _limiter() -> trio.CapacityLimiter:
    try:
        return _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(min(os.cpu_count() or 1, defaults.AVERAGING_THREADS))
        _threads.set(limiter)
        return limiter
