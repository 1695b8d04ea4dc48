"""The invariant that every target is held to: it returns or raises RemoteError, in bounded memory and time."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Final

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError

BASE_BYTES: Final = 2 << 20
BYTES_PER_INPUT_BYTE: Final = 1024
"""Python objects that one byte of input may make: an empty map of one byte becomes a dict of 64, for each of
the three or four decoders that a target compares."""

BASE_SECONDS: Final = 2.0
SECONDS_PER_INPUT_BYTE: Final = 100e-6
"""Processor time of this thread, instrumented, for all the decoders that a target compares."""

MAX_ERROR_CHARACTERS: Final = 2 * defaults.MAX_ERROR_CHARACTERS
"""Errors go into logs and answers: their length must not be the peer's choice."""


class Violation(AssertionError):
    """A target broke the invariant without raising by itself."""


def check(target: Callable[[bytes], None], data: bytes) -> None:
    """Run ``target``, again if it broke a limit. Anything but RemoteError comes through; Violation for limits.

    Memory is what Python allocates (tracemalloc); torch's own is bounded by the targets and, in the fuzzer's
    processes, by a limit of address space.
    """
    if not tracemalloc.is_tracing():
        tracemalloc.start(1)
    try:
        _measured(target, data)
    except Violation:
        _measured(target, data)  # once is not enough: a cache may have been filled, a collector have run


def _measured(target: Callable[[bytes], None], data: bytes) -> None:
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    started = time.thread_time()
    try:
        target(data)
    except RemoteError as e:
        if not 0 < len(str(e)) <= MAX_ERROR_CHARACTERS:
            raise Violation(f"an error text of {len(str(e))} characters: {e!s:.200}") from e
    seconds = time.thread_time() - started
    used = tracemalloc.get_traced_memory()[1] - before
    if used > BASE_BYTES + BYTES_PER_INPUT_BYTE * len(data):
        raise Violation(f"{used} bytes of memory for an input of {len(data)}")
    if seconds > BASE_SECONDS + SECONDS_PER_INPUT_BYTE * len(data):
        raise Violation(f"{seconds:.1f} s for an input of {len(data)} bytes")
