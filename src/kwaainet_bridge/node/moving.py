"""When a node that chose its blocks itself moves to others: how often it looks, and whether it has room for both."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import ModelInfo, ModelOutline
from kwaainet_bridge.hivemind.client.block_choice import Advice
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.node.choosing import ReadableNetwork, reconsider_blocks
from kwaainet_bridge.node.memory import available_bytes
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.models import shown
from kwaainet_bridge.node.served import ServedBlocks

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

PLACEMENT: Final = "placement"
"""The condition that the node got to the blocks that it is needed at."""


class Placement:
    """Where a node should be that chooses its blocks. ``rng`` draws pauses and what others might do.

    ``memory`` tells the bytes that are left on a torch device, None if that is not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Sequence[ReadableNetwork],
        state: ModelState,
        *,
        rng: random.Random,
        memory: Callable[[str], int | None] = available_bytes,
    ) -> None:
        self._config = config
        self._networks = networks
        self._state = state
        self._rng = rng
        self._memory = memory
        self._failures = 0
        self._told = ""

    def may_change(self, blocks: range, model: ModelInfo) -> bool:
        """Whether a node with these blocks can ever come to be elsewhere."""
        config = self._config
        switched_on = config.rebalance_seconds > 0 and config.balance_quality > 0
        return config.blocks_to_choose is not None and switched_on and len(blocks) < model.num_blocks

    async def look(self, served: ServedBlocks) -> Advice | None:
        """Where the node should be; None if nobody can tell. The log tells why it stays when that is a new reason."""
        engine, announcer = served.engine, served.announcer
        if not announcer.dialable:
            return None  # it is in nobody's way
        info = ServerInfo(ServerState.ONLINE, announcer.offer.throughput.overall)
        model = ModelOutline(engine.model.family, engine.model.num_blocks)
        own = Span(announcer.own, engine.blocks, info)
        advice = await reconsider_blocks(self._config, self._networks, model, own, rng=self._rng)
        if advice is not None and advice.blocks == engine.blocks:
            if advice.reason != self._told:
                log.info("blocks stay", blocks=shown(engine.blocks), reason=advice.reason)
                self._told = advice.reason
            self.settled()
        return advice

    async def wait_for_better(self, served: ServedBlocks) -> range:
        """Look from time to time, and return once other blocks are needed more: those."""
        while True:
            await trio.sleep(self._rng.uniform(0, 2 * self._mean_pause()))
            advice = await self.look(served)
            if advice is not None and advice.blocks != served.engine.blocks:
                log.info(
                    "other blocks are needed more",
                    blocks=shown(served.engine.blocks),
                    needed=shown(advice.blocks),
                    reason=advice.reason,
                )
                return advice.blocks

    def has_room_for_both(self, num_bytes: int) -> bool:
        """Whether a second span, with its KV cache ``num_bytes`` in all, fits into memory beside the first."""
        left = self._memory(self._config.device)
        fits = left is not None and left >= num_bytes + defaults.MOVE_SPARE_BYTES
        log.info(
            "the next blocks are loaded first" if fits else "the present blocks are dropped first",
            needed_mib=num_bytes // defaults.MIB,
            left_mib=None if left is None else left // defaults.MIB,
        )
        return fits

    def failed(self, blocks: range, error: Exception) -> None:
        """Note that ``blocks`` cannot be loaded or served here. The next look is later."""
        self._failures += 1
        self._state.degrade(
            PLACEMENT, f"the blocks {shown(blocks)} are needed more, but cannot be served here: {error}"
        )

    def settled(self) -> None:
        """Note that the node is where it should be."""
        self._failures = 0
        self._state.recover(PLACEMENT)

    def _mean_pause(self) -> float:
        usual = self._config.rebalance_seconds
        return min(usual * 2.0 ** min(self._failures, 32), max(usual, defaults.REBALANCE_MAX_SECONDS))
