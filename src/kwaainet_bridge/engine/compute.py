"""The one thread that owns torch: a priority queue of short pieces of work, awaited from trio tasks."""

from __future__ import annotations

import enum
import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import outcome
import torch
import trio

from kwaainet_bridge.errors import BridgeError, EngineError

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Lower runs first; equal ones run in the order of arrival."""

    INFERENCE = 0
    BATCH = 1


@dataclass(order=True, slots=True)
class _Piece:
    priority: int
    serial: int
    work: Callable[[], Any] = field(compare=False)
    task: trio.lowlevel.Task = field(compare=False)
    started: bool = field(default=False, compare=False)


class ComputeThread:
    """Runs pieces of work one at a time, outside the event loop, with gradients switched off.

    Make it inside a trio run and close it there. A piece is never interrupted, so callers cut long work into
    pieces: whoever is more urgent waits for at most one.
    """

    def __init__(self, name: str = "compute") -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._finished = trio.Event()
        self._changed = threading.Condition()
        self._queue: list[_Piece] = []
        self._serial = itertools.count()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], priority: Priority = Priority.INFERENCE) -> T:
        """Return what ``work()`` returns, computed in the thread.

        Raises what it raises: errors of this package as they are, any other exception as EngineError with
        that one as its cause. EngineError if the thread is closed or gets closed while the piece waits.

        Cancelled while the piece waits: it never runs. Cancelled while it runs: it runs to its end, its
        result is returned, and the cancellation arrives at the caller's next checkpoint; so nothing runs on
        behalf of a task that has left.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        piece = _Piece(priority, next(self._serial), work, trio.lowlevel.current_task())
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            heapq.heappush(self._queue, piece)
            self._changed.notify()

        def abort(_raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            with self._changed:
                if piece.started:
                    return trio.lowlevel.Abort.FAILED
                self._queue.remove(piece)
                heapq.heapify(self._queue)
            return trio.lowlevel.Abort.SUCCEEDED

        return cast("T", await trio.lowlevel.wait_task_rescheduled(abort))

    async def aclose(self) -> None:
        """Fail the waiting pieces with EngineError, let the running one end, and join the thread.

        Not cancellable: it takes as long as the running piece. Closing again does nothing.
        """
        with self._changed:
            self._closing = True
            waiting, self._queue = self._queue, []
            self._changed.notify()
        for piece in waiting:
            trio.lowlevel.reschedule(piece.task, outcome.Error(EngineError("the engine was closed")))
        with trio.CancelScope(shield=True):
            await self._finished.wait()
        self._thread.join()  # it has left its loop: this takes microseconds

    def _main(self) -> None:
        torch.set_grad_enabled(False)  # a setting of this thread
        try:
            while (piece := self._next()) is not None:
                result = outcome.capture(_mapped, piece.work)
                self._token.run_sync_soon(trio.lowlevel.reschedule, piece.task, result)
                del piece, result  # an idle thread must not keep tensors alive
            self._token.run_sync_soon(self._finished.set)
        except trio.RunFinishedError:
            return  # the event loop is gone, and everyone who could wait with it

    def _next(self) -> _Piece | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return None
            piece = heapq.heappop(self._queue)
            piece.started = True
            return piece


def _mapped(work: Callable[[], T]) -> T:
    try:
        return work()
    except BridgeError:
        raise
    except Exception as error:  # the boundary where torch's errors become ours
        raise EngineError(f"{type(error).__name__}: {error}") from error
