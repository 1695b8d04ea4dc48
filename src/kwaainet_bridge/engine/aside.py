"""Copies of tensors that would keep the event loop for long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from kwaainet_bridge import defaults

T = TypeVar("T")


async def aside(num_bytes: int, copy: Callable[[], T]) -> T:
    """What ``copy`` returns, which copies so many bytes: in a worker thread if they are many. Not cancellable."""
    if num_bytes <= defaults.INLINE_BYTES:
        return copy()
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(copy)
