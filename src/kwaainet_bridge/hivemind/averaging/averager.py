"""An averager: takes part in groups, averages with them, shares its state.

Source of the behaviour: hivemind 1.1.12, ``averaging/averager.py``. Here all of it runs in the node's own event loop:
this module does what ``Matchmaking`` and ``AllReduce`` decide.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import BridgeError, DeadlineExceeded, RemoteError
from kwaainet_bridge.hivemind.averaging.allreduce import AllReduce, Options
from kwaainet_bridge.hivemind.averaging.dialect import Protocol, dialect_of
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode
from kwaainet_bridge.hivemind.averaging.matchmaking import Matchmaking, Rules
from kwaainet_bridge.hivemind.averaging.meeting import Meeting
from kwaainet_bridge.hivemind.averaging.methods import first_request
from kwaainet_bridge.hivemind.averaging.reducer import all_finite
from kwaainet_bridge.hivemind.averaging.split import deltas_of, share_elements
from kwaainet_bridge.hivemind.averaging.state import (
    State,
    StateSharing,
    check_tensors,
    download_state,
    state_of_tensors,
)
from kwaainet_bridge.hivemind.averaging.step import Ban, Counts, Outcome, Phase, Status, Step, StepResult
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.rpc import ServerStream
from kwaainet_bridge.rpc.method import Method
from kwaainet_bridge.wire.averaging import AveragingData, MessageCode
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


class Averager:
    """Averages ``tensors`` in place with other peers of ``prefix``, whenever a step is made.

    Used as ``async with Averager(peer, tensors, prefix="run", target_group_size=16) as averager``, once; within the
    block it serves other averagers. Leaving it cancels steps and refuses new calls.

    ``protocol`` is that of Hivemind's peers, or KwaaiNet's, ``/kwaai/avg/1.0.0``, for a peer whose DHT is KwaaiNet's.
    All of a run's peers must have the same ``prefix``, ``kind`` (the class that stock peers run), ``compression``,
    ``part_bytes``, and tensors of the same shapes and dtypes, and should have the same group sizes and times (seconds).
    Tensors are contiguous, of floats, on the CPU, and may not be changed while they are averaged; ``lock`` is held
    whenever they are read or written here.

    A member that sends no part for ``part_seconds``, or twice as long where others were slow, is left out from there
    on; one that sends no average for four times ``part_seconds`` loses its share of the rest (stock peers:
    ``next_chunk_timeout``, and twice that). After ``allreduce_seconds`` whatever is missing is given up.

    ``bandwidth`` (in any unit, the same for all) decides the share that this peer averages for others; left out, it
    is that of the others on average. In ``client_mode`` nobody calls this peer: it averages nothing for others and
    shares no state. An ``auxiliary`` peer averages for others, with weight 0. Unless it ``leads``, a peer joins groups
    of others only. ``alpha`` is how far the tensors move towards the average. ``max_rms`` refuses parts whose root mean
    square exceeds it; values that are not finite or could overflow a sum are refused always. With ``allowed_peers``
    nobody else is averaged with, given a state or asked for one. ``state`` gives what others download, by default the
    tensors. ``clock`` tells unix time.

    Raises ValueError for tensors or options that cannot be.
    """

    def __init__(
        self,
        peer: Peer,
        tensors: Sequence[torch.Tensor],
        *,
        prefix: str,
        kind: str = "DecentralizedAverager",
        protocol: Protocol = "hivemind",
        target_group_size: int | None = None,
        min_group_size: int = 2,
        matchmaking_seconds: float = defaults.AVERAGING_MATCHMAKING_SECONDS,
        request_seconds: float = defaults.AVERAGING_REQUEST_SECONDS,
        compression: CompressionType = CompressionType.NONE,
        part_bytes: int = defaults.AVERAGING_PART_BYTES,
        part_seconds: float = defaults.AVERAGING_PART_SECONDS,
        allreduce_seconds: float = defaults.AVERAGING_ALLREDUCE_SECONDS,
        max_rms: float = math.inf,
        bandwidth: float | None = None,
        bits: str = "",
        client_mode: bool = False,
        auxiliary: bool = False,
        leads: bool = True,
        alpha: float = 1.0,
        share_state: bool = True,
        state: Callable[[], State] | None = None,
        state_compression: CompressionType = CompressionType.NONE,
        allowed_peers: Collection[PeerId] | None = None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._dialect = dialect_of(protocol, prefix, kind)
        if client_mode and auxiliary:
            raise ValueError("an auxiliary peer averages for others, which nobody in client mode can")
        if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth >= 0):
            raise ValueError(
                f"bandwidth is {bandwidth}: it must be a finite number of at least 0, or left out"
            )
        for number, tensor in enumerate(tensors):
            if not tensor.is_contiguous() or not tensor.is_floating_point() or tensor.device.type != "cpu":
                raise ValueError(f"tensor {number} must be contiguous, of floats and on the CPU")
        self._total = sum(tensor.numel() for tensor in tensors)
        if not self._total:
            raise ValueError("there is nothing to average: the tensors have no elements")
        self.tensors = tuple(tensors)
        self.lock = trio.Lock()
        self.prefix = prefix
        self.peer_id = peer.peer_id
        self.mode = Mode.CLIENT if client_mode else Mode.AUXILIARY if auxiliary else Mode.NODE
        self._peer = peer
        self._options = Options(compression, part_bytes, max_rms, part_seconds, allreduce_seconds)
        self._bandwidth = bandwidth
        self._alpha = alpha
        self._clock = clock
        self._methods = self._dialect.methods
        self._matchmaking_seconds = matchmaking_seconds
        self._allowed = allowed_peers
        machine = Matchmaking(
            peer.peer_id,
            self._dialect.record_prefix,
            self._dialect.schema(self.tensors, compression, part_bytes),
            Rules(target_group_size, min_group_size, matchmaking_seconds, request_seconds),
            rng=rng or random.SystemRandom(),
            bits=bits,
            client_mode=client_mode,
            leads=leads,
            allowed=allowed_peers,
            numbers=self._dialect.numbers,
        )
        self._meeting = Meeting(machine, peer.dht, peer.client, self._methods.join_group, clock=clock)
        self._sharing = StateSharing(
            peer.dht,
            self._dialect.record_prefix,
            state or (lambda: state_of_tensors(self.tensors, self.group_bits)),
            self.lock,
            compression=state_compression,
            allowed_peers=allowed_peers,
            clock=clock,
        )
        self._sharing.allowed = share_state and self.mode is Mode.NODE
        # kept from one all-reduce to the next: the first write to new memory costs as much as several to old
        self._deltas: list[torch.Tensor] | None = None
        self._groups: dict[bytes, AllReduce | None] = {}  # None: it has not begun here
        self._groups_changed = trio.Event()
        self._one_at_a_time = trio.Lock()
        self._step: Step | None = None
        self._rounds = self._sent_bytes = self._received_bytes = 0
        self._last: StepResult | None = None
        self._counts = Counts()
        self._nursery: trio.Nursery | None = None
        self._life = self._living()

    @property
    def status(self) -> Status:
        """What it is doing now, and what it did."""
        step = self._step
        return Status(
            step.phase if step else None,
            step.group.members if step and step.group else (),
            self._rounds,
            self._sent_bytes,
            self._received_bytes,
            self._last,
            self._counts,
        )

    @property
    def group_bits(self) -> str:
        """The bits of the key at which this peer looks for its next group."""
        return self._meeting.machine.bits

    async def __aenter__(self) -> Self:
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._life.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[None]:
        server = self._peer.server
        served: list[Method[Any, Any]] = []
        if self.mode is not Mode.CLIENT:
            server.mount_stream(
                self._methods.join_group,
                self._meeting.serve,
                max_message_bytes=defaults.AVERAGING_JOIN_BYTES,
            )
            server.mount_stream(
                self._methods.aggregate_part,
                self._serve_part,
                max_message_bytes=self._options.message_bytes,
            )
            server.mount_stream(self._methods.download_state, self._sharing.serve)
            served = [self._methods.join_group, self._methods.aggregate_part, self._methods.download_state]
        try:
            async with self._meeting.running(), trio.open_nursery() as self._nursery:
                if self.mode is not Mode.CLIENT:
                    self._nursery.start_soon(self._sharing.announce)
                yield
                self._nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            for method in served:
                server.unmount(method)

    # --- steps --------------------------------------------------------------------------------------------

    async def step(
        self,
        *,
        weight: float | None = None,
        gather: Any = None,
        scheduled: float | None = None,
        timeout: float = math.inf,
    ) -> StepResult:
        """Find a group, and average with it once; the tensors are then the weighted mean of the group's.

        ``weight`` is 1 unless given, and 0 for an auxiliary peer; ``gather`` (anything that msgpack carries) is told
        to the group. The group begins at ``scheduled`` (unix seconds) or as soon after as it can, by default after
        the matchmaking time. Groups that cannot average are left for others until ``timeout`` seconds are over.

        Raises DeadlineExceeded if no group was found in time; ValueError for values that are not finite.
        Cancelled: the tensors are unchanged.
        """
        step = self.begin(weight=weight, gather=gather, scheduled=scheduled, timeout=timeout)
        try:
            return await step.result()
        finally:
            step.cancel()

    def begin(
        self,
        *,
        weight: float | None = None,
        gather: Any = None,
        scheduled: float | None = None,
        timeout: float = math.inf,
        triggered: bool = True,
    ) -> Step:
        """Begin a step that goes on in the background; steps of one averager follow each other.

        Unless ``triggered``, the group waits for ``Step.trigger`` before it averages, with the weight that the step has
        then. ``timeout`` covers the search for a group and that wait. The rest is as with ``step``.
        """
        if self._nursery is None:
            raise RuntimeError("the averager is not running: use it within `async with`")
        if weight is None or self.mode is Mode.AUXILIARY:
            weight = float(self.mode is not Mode.AUXILIARY)
        now = self._clock()
        step = Step(
            weight,
            gather=About(self._bandwidth, self.mode, gather).packed(),
            scheduled=now + self._matchmaking_seconds if scheduled is None else scheduled,
            deadline=now + timeout,
        )
        if triggered:
            step.trigger()
        self._nursery.start_soon(self._run, step, timeout)
        return step

    async def _run(self, step: Step, timeout: float) -> None:
        outcome: StepResult | Exception | None = None
        try:
            with step.scope:
                async with self._one_at_a_time:
                    self._step = step
                    outcome = self._last = await self._look_and_average(step, timeout)
                    self._rounds += 1
        except (BridgeError, ValueError) as e:
            outcome = e
        finally:
            if self._step is step:
                self._step = None
            self._counts.steps[Outcome.of(outcome)] += 1
            step.end(outcome)

    async def _look_and_average(self, step: Step, timeout: float) -> StepResult:
        while True:
            step.phase = Phase.LOOKING
            group = await self._meeting.find_group(
                gather=step.gather, scheduled=step.scheduled, deadline=step.deadline
            )
            if group is None:
                raise DeadlineExceeded(f"averaging {self.prefix!r}: no group within {timeout:g} s")
            step.group = group
            try:
                return await self._average(step, group)
            except RemoteError as e:
                log.info("averaging %s: looking for another group: %.200s", self.prefix, e)
            finally:
                step.group = None

    async def _average(self, step: Step, group: Group) -> StepResult:
        about = group.about()
        self._groups[group.group_id] = None
        try:
            shares = await self._shares([0.0 if m.mode is Mode.CLIENT else m.bandwidth for m in about])
            step.phase = Phase.WAITING
            with trio.move_on_after(max(0.0, step.deadline - self._clock())):
                await step.wait_triggered()
            if not step.triggered:
                raise DeadlineExceeded(f"averaging {self.prefix!r}: a group was found, but no trigger came")
            step.phase = Phase.AVERAGING
            reduction = await self._reduce(group, step.weight, shares)
        finally:
            del self._groups[group.group_id]
            self._notify()
        return StepResult(
            dict(zip(group.members, (member.data for member in about), strict=True)),
            dict(reduction.failed_senders),
            dict(reduction.failed_reducers),
            reduction.missing_elements,
            reduction.sent_bytes,
            reduction.received_bytes,
        )

    async def _shares(self, bandwidths: Sequence[float | None]) -> tuple[int, ...]:
        if any(bandwidths) and len(bandwidths) > defaults.AVERAGING_INLINE_BALANCE:
            return await trio.to_thread.run_sync(
                share_elements, self._total, bandwidths, self._dialect.scores
            )
        return share_elements(self._total, bandwidths, self._dialect.scores)

    async def _reduce(self, group: Group, weight: float, shares: Sequence[int]) -> AllReduce:
        async with self.lock:
            if not all_finite(self.tensors):
                raise ValueError(f"averaging {self.prefix!r}: own values are not finite")
            if self._deltas is None:
                self._deltas = deltas_of(self.tensors)
            reduction = AllReduce(
                group,
                self.tensors,
                self._deltas,
                own=self.peer_id,
                weight=weight,
                shares=shares,
                options=self._options,
            )
            self._groups[group.group_id] = reduction
            self._notify()
            began = trio.current_time()
            try:
                await reduction.run(self._peer.client, self._methods.aggregate_part)
            finally:
                self._counts.allreduce_seconds.observe(trio.current_time() - began)
                for peer, kind, why in reduction.failures:
                    self._counts.note(Ban(peer, kind, why, self._clock()))
                self._sent_bytes += reduction.sent_bytes
                self._received_bytes += reduction.received_bytes
            reduction.apply(self._alpha)
        return reduction

    def _notify(self) -> None:
        self._groups_changed.set()
        self._groups_changed = trio.Event()

    async def _serve_part(self, stream: ServerStream[AveragingData, AveragingData]) -> None:
        first = await first_request(stream)
        with trio.move_on_after(defaults.AVERAGING_REQUEST_SECONDS):
            # our leader's word that the group begins may arrive after its members' first parts
            while first.group_id not in self._groups and self._one_at_a_time.locked():
                await self._groups_changed.wait()
        while first.group_id in self._groups and self._groups[first.group_id] is None:
            await self._groups_changed.wait()
        reduction = self._groups.get(first.group_id)
        if reduction is None:
            await stream.send(AveragingData(code=MessageCode.BAD_GROUP_ID))
        else:
            await reduction.serve(stream, first)

    # --- state --------------------------------------------------------------------------------------------

    def share_state(self, *, allowed: bool, priority: float = 0.0) -> None:
        """Offer this peer's state to others, or no more. Those with the highest priority are asked first.

        Raises ValueError in client mode, in which nobody can ask.
        """
        if allowed and self.mode is Mode.CLIENT:
            raise ValueError("a peer in client mode cannot share its state")
        self._sharing.set(allowed=allowed, priority=priority)

    async def load_state_from_peers(self, check: Callable[[State], object] | None = None) -> State | None:
        """The state of the peer with the highest priority that gives it; None if nobody does.

        A state for which ``check`` raises RemoteError is left for that of the next peer; without one, a state that is
        said to be just the tensors that are averaged, but has others. It is not put into the tensors. Raises nothing
        for peers that fail. Cancelled: nothing remains.
        """
        own_bytes = sum(tensor.nbytes for tensor in self.tensors)
        return await download_state(
            self._peer,
            self._dialect,
            allowed_peers=self._allowed,
            check=check or partial(check_tensors, own=self.tensors),
            max_bytes=defaults.AVERAGING_STATE_FACTOR * own_bytes + 64 * defaults.MIB,
        )
