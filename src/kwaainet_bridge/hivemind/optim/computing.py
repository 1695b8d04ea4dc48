"""Where tensors are worked on: few bytes on the event loop, more in a thread, so that other peers are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import trio

from kwaainet_bridge import defaults

T = TypeVar("T")


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.nbytes for tensor in tensors)


async def compute(work: Callable[[], T], size: int) -> T:
    """What ``work``, on ``size`` bytes, returns or raises. Cancelled: not begun, or it goes on to its end first."""
    await trio.lowlevel.checkpoint()
    return work() if size <= defaults.INLINE_BYTES else await trio.to_thread.run_sync(work)
