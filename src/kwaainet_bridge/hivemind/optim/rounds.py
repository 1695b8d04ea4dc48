"""Rounds of averaging at the ends of epochs: begun ahead of time, or not, and given up when they take too long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from kwaainet_bridge.errors import BridgeError
from kwaainet_bridge.hivemind.averaging import Averager, Step, StepResult
from kwaainet_bridge.hivemind.optim.computing import compute, size_of

log = logging.getLogger(__name__)


class Rounds:
    """The rounds of one averager. Each has ``seconds`` to find a group, and as long again after it was triggered."""

    def __init__(self, averager: Averager, *, seconds: float) -> None:
        self.averager = averager
        self._seconds = seconds
        self._size = size_of(averager.tensors)
        self._ahead: Step | None = None
        self._current: Step | None = None

    @property
    def scheduled(self) -> bool:
        """Whether a round was begun that still waits for its use."""
        return self._ahead is not None and not self._ahead.done

    def schedule(self, *, gather: Any = None) -> None:
        """Look for a group from now on, for the next ``run``."""
        if not self.scheduled:
            self._ahead = self.averager.begin(gather=gather, timeout=self._seconds, triggered=False)

    async def run(
        self, load: Callable[[], None], *, weight: float | None = None, gather: Any = None
    ) -> StepResult | None:
        """Average once, with the group that was found ahead if there is one.

        ``load`` fills the averager's tensors. None if it fails, for whatever reason, which is logged: then
        the tensors are as ``load`` left them. Cancelled: so they are.
        """
        if not self.scheduled:
            self.schedule(gather=gather)
        step, self._ahead = self._ahead, None
        assert step is not None
        self._current = step
        try:
            async with self.averager.lock:
                await compute(load, self._size)
            if weight is not None:
                step.weight = weight
            step.trigger()
            return await self._result(step)
        finally:
            step.cancel()
            self._current = None

    async def _result(self, step: Step) -> StepResult | None:
        result = None
        try:
            with trio.move_on_after(self._seconds) as limit:
                result = await step.result()
            if limit.cancelled_caught:
                log.info("%s: averaging has not ended within %g s", self.averager.prefix, self._seconds)
        except (BridgeError, ValueError) as e:
            log.info("%s: averaging failed: %.300s", self.averager.prefix, e)
        return result

    async def tag_along(self) -> None:
        """Leave a scheduled round; if it has a group already, which counts on us, go on without a say in it."""
        step, self._ahead = self._ahead, None
        if step is None:
            return
        try:
            if step.group is None:
                return
            step.weight = 0.0
            step.trigger()
            await self._result(step)
        finally:
            step.cancel()

    def drop(self) -> None:
        """Leave a scheduled round."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None

    def give_up_search(self) -> None:
        """End a round that runs if it has no group yet."""
        if self._current is not None and self._current.group is None:
            self._current.cancel()
