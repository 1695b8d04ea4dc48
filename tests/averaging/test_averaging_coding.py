"""Where tensors are coded: on the event loop or in one of few threads."""

from __future__ import annotations

import os
import threading
from functools import partial

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging.coding import coded


@pytest.mark.parametrize(
    ("compression", "size", "here"),
    [
        (CompressionType.NONE, defaults.AVERAGING_PART_BYTES, True),
        (CompressionType.FLOAT16, 2 * defaults.AVERAGING_PART_BYTES, True),
        (CompressionType.NONE, defaults.AVERAGING_INLINE_BYTES + 1, False),
        (CompressionType.BLOCKWISE_8BIT, defaults.INLINE_COMPRESSED_BYTES, True),
        (CompressionType.BLOCKWISE_8BIT, defaults.INLINE_COMPRESSED_BYTES + 1, False),
    ],
)
async def test_only_what_takes_long_goes_to_a_thread(
    compression: CompressionType, size: int, here: bool
) -> None:
    thread = await coded(threading.get_ident, size, compression)
    assert (thread == threading.get_ident()) is here


async def test_errors_come_out_of_the_thread() -> None:
    with pytest.raises(ZeroDivisionError):
        await coded(partial(divmod, 1, 0), defaults.MIB, CompressionType.UNIFORM_8BIT)


async def test_there_are_few_threads_however_much_is_coded() -> None:
    limit = min(os.cpu_count() or 1, defaults.AVERAGING_THREADS)
    everybody_waits = threading.Barrier(limit + 1)
    running, most, lock = 0, 0, threading.Lock()

    def code() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        everybody_waits.wait(timeout=20)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(3 * limit):
            nursery.start_soon(coded, code, defaults.MIB, CompressionType.UNIFORM_8BIT)
        for _ in range(3):  # as many as may run at a time wait for this
            await trio.to_thread.run_sync(everybody_waits.wait, 20)
    assert most == limit
