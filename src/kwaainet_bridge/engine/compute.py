"""The one thread that owns torch: it runs what the scheduler says, and trio tasks await the results."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar, cast

import outcome
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import EngineCounts
from kwaainet_bridge.engine.scheduler import Priority, Scheduler
from kwaainet_bridge.errors import BridgeError, EngineDied, EngineError

__all__ = ["ComputeThread", "Merged", "Pieces", "Priority"]

log = logging.getLogger(__name__)

T = TypeVar("T")
RunMerged = Callable[[Sequence[Any]], Sequence["outcome.Outcome[Any]"]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Work that is done piece by piece, so that others come between.

    ``make`` is called in the thread; the generator that it gives runs one piece between two yields, and what it returns
    is the result. ``make`` gets a function that says whether sessions step beside the work: pieces should be small
    then. The generator is closed, in the thread, when its caller is cancelled.
    """

    make: Callable[[Callable[[], bool]], Generator[None, None, Any]]
    peer: Hashable = None


@dataclass(frozen=True, slots=True)
class Merged:
    """A step: whatever steps are ready run together, by the function that the thread was given for them.

    ``tokens`` is batch times tokens, at most what the scheduler puts into one batch.
    """

    step: Any
    tokens: int
    peer: Hashable = None


Work = Callable[[], Any] | Pieces | Merged


@dataclass(slots=True, eq=False)
class _Request:
    work: Work
    task: trio.lowlevel.Task
    generator: Generator[None, None, Any] | None = None
    started: bool = False
    running: bool = False
    since: float = 0.0
    raise_cancel: Callable[[], Any] | None = None


class ComputeThread:
    """Runs work in batches and pieces, one at a time, outside the event loop, with gradients switched off.

    Make it inside a trio run and close it there. A piece is never interrupted, so long work is cut into pieces.
    """

    def __init__(
        self,
        name: str = "compute",
        *,
        merged: RunMerged | None = None,
        batch_tokens: int = defaults.MERGED_STEP_TOKENS,
        shares: Mapping[Hashable, float] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.merged = merged
        self.counts = EngineCounts()
        self._token = trio.lowlevel.current_trio_token()
        self._finished = trio.Event()
        self._changed = threading.Condition()
        self._scheduler = Scheduler(batch_tokens, defaults.SCHEDULER_PATIENCE_SECONDS, shares or {})
        self._requests: dict[int, _Request] = {}
        self._serial = itertools.count()
        self._clock = clock
        self._closing = False
        self._died: str | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Work, priority: Priority = Priority.INFERENCE) -> Any:
        """Return what ``work`` gives, computed in the thread. ``priority`` does not matter for a step.

        Raises what it raises: errors of this package as they are, any other exception as EngineError with
        that one as its cause. EngineError if the thread is closed or gets closed while the work waits, EngineDied if it
        has died.

        Cancelled while it waits: it never runs. Cancelled while a piece runs: that piece runs to its end. If it was the
        last one, its result is returned and the cancellation arrives at the caller's next checkpoint; else the rest
        never runs. So nothing runs on behalf of a task that has left.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        key = next(self._serial)
        request = _Request(work, trio.lowlevel.current_task(), since=self._clock())
        tokens, peer = 1, None
        if isinstance(work, Merged):
            priority, tokens, peer = Priority.STEP, work.tokens, work.peer
        elif isinstance(work, Pieces):
            peer = work.peer
        with self._changed:
            if self._died is not None:
                raise EngineDied(self._died)
            if self._closing:
                raise EngineError("the engine is closed")
            self._requests[key] = request
            self._scheduler.submit(key, priority, request.since, peer=peer, tokens=tokens)
            self._changed.notify()

        def abort(raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            with self._changed:
                if request.started:
                    request.raise_cancel = raise_cancel
                    if not request.running and not self._closing:
                        self._changed.notify()
                    return trio.lowlevel.Abort.FAILED
                self._scheduler.cancel(key)
                self._requests.pop(key, None)
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    async def aclose(self) -> None:
        """Fail what waits with EngineError, let the running piece end, and join the thread.

        Not cancellable: it takes as long as the running piece. Closing again does nothing.
        """
        with self._changed:
            self._closing = True
            waiting = [(key, request) for key, request in self._requests.items() if not request.started]
            for key, _ in waiting:
                self._scheduler.cancel(key)
                del self._requests[key]
            self._changed.notify()
        for _, request in waiting:
            trio.lowlevel.reschedule(request.task, outcome.Error(EngineError("the engine was closed")))
        with trio.CancelScope(shield=True):
            await self._finished.wait()
        self._thread.join()  # it has left its loop: this takes microseconds

    def _main(self) -> None:
        torch.set_grad_enabled(False)  # a setting of this thread
        try:
            try:
                self._work()
            except trio.RunFinishedError:
                raise
            except BaseException as error:
                log.critical("the compute thread has died", exc_info=error)
                self._die(error)
            self._token.run_sync_soon(self._finished.set)
        except trio.RunFinishedError:
            return  # the event loop is gone, and everyone who could wait with it

    def _work(self) -> None:
        while batch := self._next():
            began = self._clock()
            results = self._run(batch)
            self._end(batch, results, began)
            del batch, results  # an idle thread must not keep tensors alive

    def _die(self, error: BaseException) -> None:
        """Fail what waits, now and later: nobody would compute it."""
        with self._changed:
            self._died = f"the compute thread has died of {type(error).__name__}: {error}"
            for request in self._requests.values():
                request.started = True  # its result is on the way: a cancellation comes too late
                failed = EngineDied(self._died)
                failed.__cause__ = error
                self._tell(request, outcome.Error(failed))
            self._requests.clear()

    def _next(self) -> dict[int, _Request]:
        """What runs now; waits for something. Empty when the thread is to end."""
        with self._changed:
            while True:
                self._drop_abandoned()
                keys = self._scheduler.next(self._clock())
                if keys:
                    break
                if self._closing:
                    return {}
                until = self._scheduler.held_until
                self._changed.wait(None if until is None else max(0.0, until - self._clock()))
            batch = {key: self._requests[key] for key in keys}
            for request in batch.values():
                request.started = request.running = True
            return batch

    def _drop_abandoned(self) -> None:
        """End what has begun and whose caller was cancelled, or whose thread is being closed, between two pieces."""
        for key, request in [(k, r) for k, r in self._requests.items() if r.started]:
            if request.raise_cancel is not None:
                result = outcome.capture(request.raise_cancel)
            elif self._closing:
                result = outcome.Error(EngineError("the engine was closed"))
            else:
                continue
            if request.generator is not None:
                request.generator.close()
            self._scheduler.cancel(key)
            del self._requests[key]
            self._tell(request, result)

    def _run(self, batch: dict[int, _Request]) -> list[outcome.Outcome[Any] | None]:
        """The results; None for work that has more pieces."""
        first = next(iter(batch.values()))
        if isinstance(first.work, Merged):
            assert self.merged is not None
            steps = [cast("Merged", request.work).step for request in batch.values()]
            return [_mapped(result) for result in self.merged(steps)]
        if isinstance(first.work, Pieces):
            if first.generator is None:
                first.generator = first.work.make(self._contended)
            return [_advance(first.generator)]
        return [_mapped(outcome.capture(first.work))]

    def _contended(self) -> bool:
        with self._changed:
            return self._scheduler.contended(self._clock())

    def _end(
        self, batch: dict[int, _Request], results: list[outcome.Outcome[Any] | None], began: float
    ) -> None:
        with self._changed:
            now = self._clock()
            self._count(batch, began, now)
            self._scheduler.done(now, now - began, finished=results[0] is not None)
            for (key, request), result in zip(batch.items(), results, strict=True):
                request.running = False
                if result is not None:
                    del self._requests[key]
                    self._tell(request, result)

    def _count(self, batch: dict[int, _Request], began: float, now: float) -> None:
        steps = [request for request in batch.values() if isinstance(request.work, Merged)]
        if steps:
            for request in steps:
                self.counts.queue_seconds.observe(began - request.since)
            self.counts.batch_seconds.observe(now - began)
            self.counts.batch_tokens.observe(sum(cast("Merged", request.work).tokens for request in steps))

    def _tell(self, request: _Request, result: outcome.Outcome[Any]) -> None:
        self._token.run_sync_soon(trio.lowlevel.reschedule, request.task, result)


def _advance(generator: Generator[None, None, Any]) -> outcome.Outcome[Any] | None:
    try:
        next(generator)
    except StopIteration as end:
        return outcome.Value(end.value)
    except BaseException as error:
        return _mapped(outcome.Error(error))
    return None


def _mapped(result: outcome.Outcome[T]) -> outcome.Outcome[T]:
    """The boundary where torch's errors become ours."""
    error = result.error if isinstance(result, outcome.Error) else None
    if error is None or isinstance(error, BridgeError) or not isinstance(error, Exception):
        return result
    mapped = EngineError(f"{type(error).__name__}: {error}")
    mapped.__cause__ = error
    return outcome.Error(mapped)
