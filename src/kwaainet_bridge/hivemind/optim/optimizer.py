"""An optimizer that trains one model together with other peers, stock ``hivemind.Optimizer`` peers among them.

Source of the behaviour: hivemind 1.1.12, ``optim/optimizer.py``, in its default mode.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import trio
from cryptography.hazmat.primitives.asymmetric import rsa

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging import Averager, State
from kwaainet_bridge.hivemind.optim.computing import compute, size_of
from kwaainet_bridge.hivemind.optim.gradients import Gradients
from kwaainet_bridge.hivemind.optim.progress import SwarmProgress
from kwaainet_bridge.hivemind.optim.rounds import Rounds
from kwaainet_bridge.hivemind.optim.state_rounds import StateRounds
from kwaainet_bridge.hivemind.optim.tracker import ProgressTracker
from kwaainet_bridge.hivemind.optim.training_state import Scheduler, TrainingState
from kwaainet_bridge.hivemind.peer import Peer

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """How an epoch ended here: with which ``samples`` of this peer, and the gradients of how many peers.

    ``gradient_peers`` is 1 if they were this peer's alone; ``stepped`` says whether the optimizer made its step.
    """

    epoch: int
    samples: int
    gradient_peers: int
    stepped: bool


class CollaborativeOptimizer:
    """Steps ``optimizer`` once the run's peers have computed ``target_batch_size`` samples between them.

    Used as ``async with CollaborativeOptimizer(peer, optimizer, run_id="run", target_batch_size=1024) as opt``, once.
    After each backward pass: ``await opt.step(batch_size=8)``. The gradients are to be the mean of the batch; ``step``
    takes and removes them. Parameters change within ``step`` and ``load_state_from_peers`` only.

    All peers of a run need the same model and kind of optimizer, ``target_batch_size``, compressions, statistics and
    extra tensors, and should have the same times (seconds).

    ``scheduler``, of torch's ``lr_scheduler``, is stepped once per epoch, so that those who join later have the same
    rate. Parameters (and ``extra_tensors``, such as running means, and the optimizer's ``average_statistics`` by name)
    are averaged every ``average_state_every`` epochs, with ``delay_state_averaging`` during the next epoch. A peer in
    ``client_mode``, by default that of ``peer``, is called by nobody. An ``auxiliary`` one computes no samples and
    helps others to average: it calls ``step()`` again and again, about every half second. ``averager_options`` are
    further arguments for both averagers. ``owner_key`` signs what this peer reports; by default it is a new one.

    Raises ValueError for what cannot be exchanged with peers.
    """

    def __init__(
        self,
        peer: Peer,
        optimizer: torch.optim.Optimizer,
        *,
        run_id: str,
        target_batch_size: int,
        batch_size: int | None = None,
        scheduler: Scheduler | None = None,
        matchmaking_seconds: float = defaults.TRAINING_MATCHMAKING_SECONDS,
        averaging_seconds: float = defaults.TRAINING_AVERAGING_SECONDS,
        load_seconds: float = defaults.TRAINING_LOAD_SECONDS,
        average_state_every: int = 1,
        delay_state_averaging: bool = True,
        client_mode: bool | None = None,
        auxiliary: bool = False,
        gradient_compression: CompressionType = CompressionType.NONE,
        state_compression: CompressionType = CompressionType.NONE,
        load_compression: CompressionType = CompressionType.NONE,
        average_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        averager_options: Mapping[str, Any] | None = None,
        owner_key: rsa.RSAPrivateKey | None = None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        if average_state_every < 1:
            raise ValueError(f"average_state_every is {average_state_every}: it must be at least 1")
        client_mode = peer.dht.client_mode if client_mode is None else client_mode
        self.optimizer = optimizer
        self.auxiliary = auxiliary
        self.latest: EpochEnd | None = None
        self._client_mode = client_mode
        self._batch_size = batch_size
        self._matchmaking_seconds = matchmaking_seconds
        self._load_seconds = load_seconds
        self._average_state_every = average_state_every
        self._delay_state_averaging = delay_state_averaging and not auxiliary
        self._clock = clock
        self._state = TrainingState(
            optimizer, scheduler=scheduler, average_statistics=average_statistics, extra_tensors=extra_tensors
        )
        self._gradients = Gradients(self._state.parameters)
        self._size = size_of(self._state.averaged)
        self._tracker = ProgressTracker(
            peer.dht, run_id, target_batch_size, client_mode=client_mode, key=owner_key, clock=clock
        )
        options: dict[str, Any] = {
            "matchmaking_seconds": matchmaking_seconds,
            "request_seconds": min(defaults.AVERAGING_REQUEST_SECONDS, matchmaking_seconds / 2),
            "client_mode": client_mode,
            "auxiliary": auxiliary,
            "share_state": not auxiliary,
            "clock": clock,
            "rng": rng,
            **(averager_options or {}),
        }
        self._gradient_rounds = Rounds(
            Averager(
                peer,
                self._gradients.averaged,
                prefix=f"{run_id}_grad_averager",
                kind="GradientAverager",
                compression=gradient_compression,
                **options,
            ),
            seconds=averaging_seconds,
        )
        self._state_averager = Averager(
            peer,
            self._state.averaged,
            prefix=f"{run_id}_state_averager",
            kind="TrainingStateAverager",
            compression=state_compression,
            state=self._shared_state,
            state_compression=load_compression,
            **options,
        )
        self._state_rounds = StateRounds(
            Rounds(self._state_averager, seconds=averaging_seconds),
            self._state,
            matchmaking_seconds=matchmaking_seconds,
            clock=clock,
        )
        self._checked = False  # whether this epoch was compared with the run's
        self._one_at_a_time = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._life = self._living()

    @property
    def epoch(self) -> int:
        """How many epochs this peer's parameters have seen."""
        return self._state.epoch

    @property
    def samples(self) -> int:
        """What this peer has accumulated towards the end of the epoch."""
        return self._gradients.samples

    @property
    def swarm(self) -> SwarmProgress:
        """How far the run is, as it was last seen."""
        return self._tracker.progress.swarm

    async def __aenter__(self) -> Self:
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._life.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._state_averager)
            await stack.enter_async_context(self._gradient_rounds.averager)
            self._nursery = await stack.enter_async_context(trio.open_nursery())
            await stack.enter_async_context(self._tracker.running())
            yield
            # others may count on rounds that have their groups already
            self._nursery.start_soon(self._gradient_rounds.tag_along)
            await self._state_rounds.leave()

    async def _compute(self, work: Callable[[], T]) -> T:
        return await compute(work, self._size)

    # --- steps --------------------------------------------------------------------------------------------

    async def step(self, batch_size: int | None = None) -> None:
        """Take in the parameters' gradients, of ``batch_size`` samples; end the epoch if it is time.

        A batch whose gradients are not finite is left out. If the run is ahead of this peer, the batch is left out,
        too, and the state is taken from others; if that fails, the next call tries again. Nothing that peers do, or
        fail to do, makes it raise. Cancelled: the batch counts, or is lost; an epoch that was ending ends later.
        """
        batch_size = self._batch_size if batch_size is None else batch_size
        if (batch_size is None) is not self.auxiliary:
            raise ValueError(
                "an auxiliary peer has no batches" if self.auxiliary else "the batch size is given nowhere"
            )
        async with self._one_at_a_time:
            await self._state_rounds.take_in(wait=False)
            if self.auxiliary:
                self._catch_up()
            elif self._is_behind():
                self.optimizer.zero_grad(set_to_none=True)
                await self._load_state()
                return
            else:
                assert batch_size is not None
                if not await self._compute(partial(self._gradients.accumulate, batch_size)):
                    log.warning("training: a batch was left out, its gradients are not finite")
                self._tracker.accumulated(self.epoch, self._gradients.samples)
            self._schedule()
            if self._tracker.ready():
                await self._end_epoch()
            await trio.lowlevel.checkpoint()

    def _is_behind(self) -> bool:
        """Whether to take the state from others.

        Those who were in the run's epoch and see others in the next one go there by themselves. So equal epochs are
        asked for once per epoch only, after the first look at the run in it.
        """
        if self._tracker.progress.looked and not self._checked:
            self._checked = True
            return self.epoch != self.swarm.epoch
        return self.epoch < self.swarm.epoch - 1

    def _catch_up(self) -> None:
        """Go to the run's epoch without its state, of which an auxiliary peer makes no use."""
        if self.epoch < self.swarm.epoch - 1:
            self._state.begin_epoch(self.swarm.epoch)
            self._tracker.begin_epoch(self.swarm.epoch)

    def _in_company(self) -> bool:
        """Whether there is somebody to average with; helping takes two."""
        return self.swarm.peers > 1 if self.auxiliary else self.swarm.others > 0

    def _averages_state(self) -> bool:
        return self._in_company() and (self.epoch + 1) % self._average_state_every == 0

    def _schedule(self) -> None:
        """Have groups meet ahead of the epoch's end."""
        if not self._in_company():
            return
        end = self._tracker.progress.end_of_epoch(now=self._clock())
        if end - self._clock() <= self._matchmaking_seconds:
            self._gradient_rounds.schedule()
        if self._averages_state():
            self._state_rounds.schedule(end)

    # --- the end of an epoch ------------------------------------------------------------------------------

    async def _end_epoch(self) -> None:
        assert self._nursery is not None
        began = self._clock()
        with self._tracker.paused():
            peers = await self._average_gradients()
            await self._state_rounds.take_in()
            samples = self._gradients.samples
            stepped = not self.auxiliary and (peers > 1 or samples > 0)
            averages_state = self._averages_state()
            async with self._state_averager.lock:
                await self._compute(partial(self._update, stepped))
            # no cancellation between the step and what is told of it
            self._checked = False
            self._tracker.begin_epoch(self.epoch)
            self._offer_state()
            self.latest = EpochEnd(self.epoch, samples, peers, stepped)
            log.info("training: epoch %d, gradients of %d peers", self.epoch, peers)
            if averages_state and self._state_rounds.is_due():
                self._state_rounds.begin(self._nursery, epoch_ended=began)
                if not self._delay_state_averaging:
                    await self._state_rounds.take_in()
            else:
                self._state_rounds.drop()

    def _update(self, stepped: bool) -> None:
        if stepped:
            self._gradients.apply()
            self._state.step()
        self._state.begin_epoch(self.epoch + 1)
        self._gradients.reset()

    async def _average_gradients(self) -> int:
        """Average, or else take this peer's own; returns of how many peers they are."""
        if self._in_company():
            weight = None if self.auxiliary else float(self._gradients.samples)
            result = await self._gradient_rounds.run(self._gradients.load, weight=weight)
            if result is not None:
                return len(result.gathered)
            log.warning("training: epoch %d ends with own gradients alone", self.epoch + 1)
        self._gradient_rounds.drop()
        async with self._gradient_rounds.averager.lock:
            await self._compute(self._gradients.load)
        return 1

    # --- the state ----------------------------------------------------------------------------------------

    def _shared_state(self) -> State:
        return self._state.shared(self._state_averager.group_bits)

    def _offer_state(self) -> None:
        if not self._client_mode and not self.auxiliary:
            self._state_averager.share_state(allowed=True, priority=float(self.epoch))
            self._gradient_rounds.averager.share_state(allowed=True, priority=float(self.epoch))

    def _take_over(self, state: State) -> None:
        self._state.load(state)
        self._gradients.reset()

    async def load_state_from_peers(self) -> bool:
        """Take over parameters, optimizer state and epoch of whoever is farthest; False if nobody gives a better one.

        Samples that were accumulated are dropped then. ``step`` calls this by itself when it is needed. Cancelled:
        nothing has changed.
        """
        async with self._one_at_a_time:
            await self._state_rounds.take_in()
            return await self._load_state()

    async def _load_state(self) -> bool:
        assert self._nursery is not None
        self._nursery.start_soon(self._gradient_rounds.tag_along)
        await self._state_rounds.take_in()
        with self._tracker.paused():
            state = None
            with trio.move_on_after(self._load_seconds):
                state = await self._state_averager.load_state_from_peers(check=self._state.check)
            if state is None:
                log.warning("training: nobody gave a state of epoch %d or later", self.epoch)
                await trio.sleep(defaults.TRAINING_RETRY_SECONDS)
                return False
            before = self.epoch
            async with self._state_averager.lock:
                await self._compute(partial(self._take_over, state))
            if self.epoch == self.swarm.epoch - 1:
                self._state.begin_epoch(self.swarm.epoch)
            elif self.epoch == before < self.swarm.epoch:
                # whoever reports that epoch has not shown its state
                until = self._clock() + defaults.TRAINING_DOUBT_SECONDS
                self._tracker.progress.doubt(until=until, now=self._clock())
            self._tracker.accumulated(self.epoch, 0)
            self._offer_state()
        log.info("training: took the state of epoch %d from another peer", self.epoch)
        return True
