"""An averager: takes part in groups, averages with them, shares its state.

Source of the behaviour: hivemind 1.1.12, ``averaging/averager.py``. Here all of it runs in the node's own event loop:
this module does what ``Matchmaking`` and ``AllReduce`` decide.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, RemoteError
from kwaainet_bridge.hivemind.averaging.allreduce import AllReduce, Options
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode
from kwaainet_bridge.hivemind.averaging.group_keys import check_prefix, schema_hash
from kwaainet_bridge.hivemind.averaging.matchmaking import Matchmaking, Rules
from kwaainet_bridge.hivemind.averaging.meeting import Meeting
from kwaainet_bridge.hivemind.averaging.methods import first_request, methods
from kwaainet_bridge.hivemind.averaging.split import share_elements
from kwaainet_bridge.hivemind.averaging.state import State, StateSharing, download_state
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.rpc import RpcClient, RpcServer, ServerStream
from kwaainet_bridge.wire.averaging import AveragingData, MessageCode
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One round: what each member gathered for, and what was missing in it.

    ``failed_senders`` are members whose values are not (all) in our share of the average, ``failed_reducers`` those
    whose shares kept our local values in part or whole: ``missing_elements`` of them.
    """

    gathered: dict[PeerId, Any]
    failed_senders: dict[PeerId, str]
    failed_reducers: dict[PeerId, str]
    missing_elements: int


class Averager:
    """Averages ``tensors`` in place with other peers of ``prefix``, whenever ``step`` is called.

    All of a run's peers must have the same prefix, ``kind`` (the class that stock peers run), shapes, dtypes,
    ``options.compression`` and ``options.part_bytes``. Tensors are contiguous, of floats, on the CPU, and may not be
    changed while a step runs; ``lock`` is held whenever they are read or written here.

    In ``client_mode`` nobody calls this peer: it averages nothing for others and shares no state. An ``auxiliary``
    peer averages for others, with weight 0. ``state`` gives what others download, by default the tensors.
    """

    def __init__(
        self,
        dht: DhtNode,
        server: RpcServer,
        client: RpcClient,
        tensors: Sequence[torch.Tensor],
        *,
        prefix: str,
        kind: str = "DecentralizedAverager",
        rules: Rules | None = None,
        options: Options | None = None,
        bits: str = "",
        client_mode: bool = False,
        auxiliary: bool = False,
        alpha: float = 1.0,
        share_state: bool = True,
        state: Callable[[], State] | None = None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        check_prefix(prefix)
        if client_mode and auxiliary:
            raise ValueError("an auxiliary peer averages for others, which nobody in client mode can")
        for number, tensor in enumerate(tensors):
            if not tensor.is_contiguous() or not tensor.is_floating_point() or tensor.device.type != "cpu":
                raise ValueError(f"tensor {number} must be contiguous, of floats and on the CPU")
        self._total = sum(tensor.numel() for tensor in tensors)
        if not self._total:
            raise ValueError("there is nothing to average: the tensors have no elements")
        self.lock = trio.Lock()
        self.peer_id = dht.peer_id
        self.mode = Mode.CLIENT if client_mode else Mode.AUXILIARY if auxiliary else Mode.NODE
        self._tensors = tuple(tensors)
        self._dht = dht
        self._server = server
        self._client = client
        self._prefix = prefix
        self._options = options or Options()
        self._alpha = alpha
        self._clock = clock
        self._methods = methods(prefix, kind)
        rules = rules or Rules()
        self._matchmaking_seconds = rules.matchmaking_seconds
        self._meeting = Meeting(
            Matchmaking(
                dht.peer_id,
                prefix,
                schema_hash(self._tensors),
                rules,
                rng=rng or random.SystemRandom(),
                bits=bits,
                client_mode=client_mode,
            ),
            dht,
            client,
            self._methods.join_group,
            clock=clock,
        )
        self._sharing = StateSharing(dht, prefix, state or self._own_state, self.lock, clock=clock)
        self._sharing.allowed = share_state and self.mode is Mode.NODE
        self._groups: dict[bytes, AllReduce] = {}
        self._groups_changed = trio.Event()
        self._step = trio.Lock()

    @property
    def group_bits(self) -> str:
        """The bits of the key at which this peer looks for its next group."""
        return self._meeting.machine.bits

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Averager]:
        """Serve other averagers within the block. To be entered once.

        Leaving it refuses new calls; calls of this prefix that still run end with the host.
        """
        if self.mode is not Mode.CLIENT:
            self._server.mount_stream(self._methods.join_group, self._meeting.serve)
            self._server.mount_stream(
                self._methods.aggregate_part,
                self._serve_part,
                # a difference is float32 whatever the part was compressed to, and eight bits may become 32
                max_message_bytes=8 * self._options.part_bytes + 64 * defaults.KIB,
            )
            self._server.mount_stream(self._methods.download_state, self._sharing.serve)
        try:
            async with self._meeting.running(), trio.open_nursery() as nursery:
                if self.mode is not Mode.CLIENT:
                    nursery.start_soon(self._sharing.announce)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            if self.mode is not Mode.CLIENT:
                for method in (
                    self._methods.join_group,
                    self._methods.aggregate_part,
                    self._methods.download_state,
                ):
                    self._server.unmount(method)

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
        if weight is None or self.mode is Mode.AUXILIARY:
            weight = float(self.mode is not Mode.AUXILIARY)
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight is {weight}: it must be a finite number of at least 0")
        about = About(None, self.mode, gather).packed()
        now = self._clock()
        async with self._step:
            while True:
                group = await self._meeting.find_group(
                    gather=about,
                    scheduled=now + self._matchmaking_seconds if scheduled is None else scheduled,
                    deadline=now + timeout,
                )
                if group is None:
                    raise DeadlineExceeded(f"averaging {self._prefix!r}: no group within {timeout:g} s")
                try:
                    return await self._average(group, weight)
                except RemoteError as e:
                    log.info("averaging %s: looking for another group: %.200s", self._prefix, e)

    async def _average(self, group: Group, weight: float) -> StepResult:
        about = group.about()
        shares = share_elements(
            self._total, [0.0 if member.mode is Mode.CLIENT else member.bandwidth for member in about]
        )
        async with self.lock:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in self._tensors):
                raise ValueError(f"averaging {self._prefix!r}: own values are not finite")
            reduction = AllReduce(
                group, self._tensors, own=self.peer_id, weight=weight, shares=shares, options=self._options
            )
            self._groups[group.group_id] = reduction
            self._notify()
            try:
                await reduction.run(self._client, self._methods.aggregate_part)
            finally:
                del self._groups[group.group_id]
            reduction.apply(self._alpha)
        return StepResult(
            dict(zip(group.members, (member.data for member in about), strict=True)),
            dict(reduction.failed_senders),
            dict(reduction.failed_reducers),
            reduction.missing_elements,
        )

    def _notify(self) -> None:
        self._groups_changed.set()
        self._groups_changed = trio.Event()

    async def _serve_part(self, stream: ServerStream[AveragingData, AveragingData]) -> None:
        first = await first_request(stream)
        with trio.move_on_after(defaults.AVERAGING_REQUEST_SECONDS):
            # our leader's word that the group begins may arrive after its members' first parts
            while first.group_id not in self._groups and self._step.locked():
                await self._groups_changed.wait()
        reduction = self._groups.get(first.group_id)
        if reduction is None:
            await stream.send(AveragingData(code=MessageCode.BAD_GROUP_ID))
        else:
            await reduction.serve(stream, first)

    # --- state --------------------------------------------------------------------------------------------

    def _own_state(self) -> State:
        return State({"group_key": self.group_bits}, self._tensors)

    def share_state(self, *, allowed: bool, priority: float = 0.0) -> None:
        """Offer this peer's state to others, or no more. Those with the highest priority are asked first.

        Raises ValueError in client mode, in which nobody can ask.
        """
        if allowed and self.mode is Mode.CLIENT:
            raise ValueError("a peer in client mode cannot share its state")
        self._sharing.set(allowed=allowed, priority=priority)

    async def load_state_from_peers(self) -> State | None:
        """The state of the peer with the highest priority that gives it; None if nobody does.

        It is not put into the tensors. Raises nothing for peers that fail. Cancelled: nothing remains.
        """
        own_bytes = sum(tensor.nbytes for tensor in self._tensors)
        return await download_state(
            self._dht,
            self._client,
            self._methods.download_state,
            self._prefix,
            max_bytes=defaults.AVERAGING_STATE_FACTOR * own_bytes + 64 * defaults.MIB,
        )
