"""Averaging of parameters at the ends of epochs: when a round is begun, and what becomes of its average."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from kwaainet_bridge.hivemind.averaging import StepResult
from kwaainet_bridge.hivemind.optim.computing import compute, size_of
from kwaainet_bridge.hivemind.optim.progress import Rate
from kwaainet_bridge.hivemind.optim.rounds import Rounds
from kwaainet_bridge.hivemind.optim.training_state import TrainingState

log = logging.getLogger(__name__)


class _Round:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.result: StepResult | None = None
        self.ended = trio.Event()

    def told(self) -> list[int]:
        """The epochs of the group, by the words of its members."""
        gathered = [] if self.result is None else self.result.gathered.values()
        return [epoch for epoch in gathered if isinstance(epoch, int)]


class StateRounds:
    """The rounds in which ``state`` is averaged, one at a time; each may go on while the next epoch is computed.

    Peers may meet others who are a step ahead or behind: the mean lies between two steps then, and who applies it loses
    a part of one. Stock peers do. They would also meet again and again, since the ones look for their next group while
    the others look for this one. Here an average is applied if most of its group were in the same epoch; else who is
    ahead does not look for the next group ahead of time, and who is behind leaves out the round that the others have
    had.
    """

    def __init__(
        self, rounds: Rounds, state: TrainingState, *, matchmaking_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._rounds = rounds
        self._state = state
        self._matchmaking_seconds = matchmaking_seconds
        self._clock = clock
        self._current: _Round | None = None
        self._delay = Rate(
            now=clock()
        )  # its "samples" are rounds: from the end of an epoch to their beginning
        self._looks_ahead = True
        self._held = 0  # the last epoch whose parameters were averaged, as far as is known

    def schedule(self, end_of_epoch: float) -> None:
        """Look for the group of the next epoch, if it is time for that; ``end_of_epoch`` is an estimate."""
        delay = self._delay.seconds
        if delay is None or not self._looks_ahead or self._current is not None:
            return
        if end_of_epoch + delay - self._clock() <= self._matchmaking_seconds:
            self._rounds.schedule(gather=self._state.epoch + 1)

    def is_due(self) -> bool:
        """Whether the others may still average the parameters of the epoch that begins."""
        return self._held < self._state.epoch

    def begin(self, nursery: trio.Nursery, *, epoch_ended: float) -> None:
        """Average the state as it is now, in the background."""
        self._delay.measured(1, max(0.0, self._clock() - epoch_ended))
        self._current = _Round(self._state.epoch)
        nursery.start_soon(self._run, self._current)

    async def _run(self, current: _Round) -> None:
        try:
            current.result = await self._rounds.run(self._state.load_averaged, gather=current.epoch)
        finally:
            current.ended.set()

    def drop(self) -> None:
        """Leave the group that was looked for ahead."""
        self._rounds.drop()

    async def take_in(self, *, wait: bool = True) -> None:
        """Apply the average of the round that was begun, once it has ended, or if it has. Cancelled: no loss."""
        current = self._current
        if current is None or not (wait or current.ended.is_set()):
            return
        await current.ended.wait()
        told = current.told()
        same = told.count(current.epoch)
        if same < len(told):
            log.info("training: of %d peers %d averaged parameters of this epoch", len(told), same)
        if told:
            later = sum(epoch > current.epoch for epoch in told)
            self._held = current.epoch + (2 * later >= len(told))
            self._looks_ahead = 2 * (same + later) > len(told)
        if 2 * same > len(told):
            async with self._rounds.averager.lock:
                await compute(self._state.apply_averaged, size_of(self._state.averaged))
        self._current = None

    async def leave(self) -> None:
        """Before this peer leaves the run: go on in a group that was found, and look for none any more."""
        self._rounds.give_up_search()
        await self._rounds.tag_along()
        await self.take_in()
