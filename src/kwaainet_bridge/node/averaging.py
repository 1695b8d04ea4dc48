"""Runs of averagers that a node helps: it averages for their peers and adds nothing of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Literal

import structlog
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.config import AveragingConfig, AveragingRun
from kwaainet_bridge.hivemind.averaging import (
    Averager,
    Protocol,
    State,
    StepResult,
    dialect_of,
    download_state,
)
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.wire.peer_id import PeerId

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_AVERAGED: Final = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


class AveragingService:
    """Helps the configured runs of one network, each on its own: one that goes wrong leaves the others as they are.

    ``peer`` is what the node is in that network. Where there is no run, there is nothing to do.
    """

    def __init__(
        self,
        network: Literal["petals", "kwaainet"],
        config: AveragingConfig,
        peer: Peer,
        state: NodeState,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self.runs = tuple(run for run in config.runs if run.network == network)
        self._protocol: Final[Protocol] = "kwaai" if network == "kwaainet" else "hivemind"
        self._config = config
        self._peer = peer
        self._state = state
        self._rng = rng or random.SystemRandom()
        self._allowed = None if config.peers is None else frozenset(map(PeerId.parse, config.peers))

    async def run(self) -> None:
        """Help until cancelled, but while the node is paused.

        Members of groups that are averaging when that begins, or when it is cancelled, lose this node's share.
        """
        pausing = self._state.pausing
        while True:
            await pausing.wait_until(asked=False)
            async with trio.open_nursery() as nursery:
                for run in self.runs:
                    nursery.start_soon(self._help, run)
                await pausing.wait_until(asked=True)
                nursery.cancel_scope.cancel()

    async def _help(self, run: AveragingRun) -> None:
        tensors = await self._tensors_of(run)
        averager = Averager(
            self._peer,
            tensors,
            prefix=run.prefix,
            kind=run.kind,
            protocol=self._protocol,
            target_group_size=run.target_group_size,
            matchmaking_seconds=run.matchmaking_seconds,
            compression=CompressionType[run.compression],
            part_bytes=run.part_kib * defaults.KIB,
            max_rms=run.max_rms or torch.inf,
            bandwidth=run.bandwidth,
            bits=run.group_bits,
            auxiliary=True,
            leads=False,  # a group of this node and one other would keep that one from its peers
            allowed_peers=self._allowed,
        )
        log.info("helps a run", run=run.name, elements=sum(tensor.numel() for tensor in tensors))
        async with averager:
            self._state.averaging[run.name] = lambda: averager.status
            while True:
                try:
                    self._report(run, await averager.step())
                except ValueError as e:
                    # sums of large values; any values do, since they count for nothing
                    log.warning("starts again from zero", run=run.name, reason=str(e))
                    for tensor in tensors:
                        tensor.zero_()

    async def _tensors_of(self, run: AveragingRun) -> Sequence[torch.Tensor]:
        """Tensors as the run's peers average them, from one that shares its state; waits for such a one."""
        condition = f"averaging {run.name}"
        while True:
            state = await download_state(
                self._peer,
                dialect_of(self._protocol, run.prefix, run.kind),
                max_bytes=self._config.max_tensors_mib * defaults.MIB,
                allowed_peers=self._allowed,
            )
            tensors = averaged_tensors(state, run.kind) if state is not None else ()
            if any(tensor.numel() for tensor in tensors):
                self._state.recover(condition)
                return tensors
            self._state.degrade(
                condition, "no peer of this run shares its state, from which its tensors are known"
            )
            await trio.sleep(defaults.AVERAGING_HELP_RETRY_SECONDS * self._rng.uniform(0.5, 1.0))

    def _report(self, run: AveragingRun, result: StepResult) -> None:
        failed = {str(peer): why for peer, why in (result.failed_senders | result.failed_reducers).items()}
        log.info(
            "averaged",
            run=run.name,
            members=len(result.gathered),
            sent_bytes=result.sent_bytes,
            received_bytes=result.received_bytes,
            failed=failed,
        )


def averaged_tensors(state: State, kind: str) -> Sequence[torch.Tensor]:
    """Zeros like those tensors of a state that a run averages: all, of an optimizer's state all but its statistics.

    Empty for metadata that are not an optimizer's, and for tensors that cannot be averaged.
    """
    tensors = list(state.tensors)
    if kind == "TrainingStateAverager":
        statistics = state.metadata.get("optimizer_metadata")
        if not isinstance(statistics, list):
            return ()
        count = sum(isinstance(entry, dict) and entry.get("type") == "tensor" for entry in statistics)
        tensors = tensors[: len(tensors) - count]
    if not all(tensor.dtype in _AVERAGED for tensor in tensors):
        return ()
    return tuple(torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors)
