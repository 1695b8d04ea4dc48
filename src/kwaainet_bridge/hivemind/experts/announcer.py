"""Tells the swarm which blocks this node serves, and in which state.

Source: Petals main ``utils/dht.py`` and ``server/server.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.hivemind.experts.records import MODEL_REGISTRY_KEY, ServerInfo, ServerState, block_uid
from kwaainet_bridge.hivemind.experts.throughput import Throughput

log = logging.getLogger(__name__)

_HUB_PAGE = "https://huggingface.co/"  # what stock servers prefix the repository with; monitors link to it


@dataclass(frozen=True, slots=True)
class AnnounceReport:
    """How one round went: how many records any node acknowledged, and how many other nodes did."""

    state: ServerState
    records: int
    acknowledged: int
    by_others: int

    @property
    def ok(self) -> bool:
        return self.acknowledged == self.records


class Announcer:
    """Keeps the records of one span of blocks in the DHT: at once on a change, and renewed by :meth:`run`.

    ``info`` is what the records say, its span of blocks included; replace it as facts change. While the node is not
    ``dialable``, blocks are not announced, or withdrawn if they were: set it and announce anew.
    ``cache_tokens`` tells the tokens that one block's KV cache has room for, None before it is known.
    """

    def __init__(
        self,
        dht: DhtNode,
        prefix: str,
        info: ServerInfo,
        *,
        model_blocks: int,
        repository: str | None = None,
        cache_tokens: Callable[[], int | None] = lambda: None,
        period: float = defaults.ANNOUNCE_PERIOD_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if info.start_block is None or info.end_block is None:
            raise ValueError("the records of a span name its blocks")
        self.info = info
        self.dialable = True
        self.wanted = ServerState.OFFLINE
        self.cache_tokens = cache_tokens
        self._dht = dht
        self.prefix = prefix
        self._uids = [block_uid(prefix, block) for block in range(info.start_block, info.end_block)]
        page = f"{_HUB_PAGE}{repository}" if repository else None
        self._model = {"num_blocks": model_blocks, "repository": page}
        self._period = period
        self._announced = False
        self._clock = clock

    def set_throughput(self, measured: Throughput) -> None:
        """Announce these rates from the next round on."""
        self.info = replace(
            self.info,
            throughput=measured.overall,
            inference_rps=measured.inference_rps,
            forward_rps=measured.forward_rps,
            network_rps=measured.network_rps,
        )

    async def run(self) -> None:
        """Renew the records every period until cancelled, beginning one period from now."""
        while True:
            await trio.sleep(self._period)
            await self.announce(self.wanted)

    async def announce(self, state: ServerState) -> AnnounceReport:
        """Store the records with ``state`` now and keep renewing them so; OFFLINE instead while not dialable.

        Nothing is stored to withdraw records that never were. Returns once every node asked has answered or failed.
        Never raises for peers.
        """
        self.wanted = state
        if not self.dialable:
            log.warning(
                "%d blocks of %s are not announced: nobody can dial this node", len(self._uids), self.prefix
            )
            state = ServerState.OFFLINE
        if state is ServerState.OFFLINE and not self._announced:
            return AnnounceReport(state=state, records=0, acknowledged=0, by_others=0)
        self._announced = state is not ServerState.OFFLINE
        tokens = self.cache_tokens()
        # this number counts keys and values apart, as stock clients expect
        self.info = replace(self.info, state=state, cache_tokens_left=None if tokens is None else 2 * tokens)
        expiration = self._clock() + defaults.ANNOUNCE_LIFETIME_PERIODS * self._period
        value = self.info.to_value()
        items = [Item(uid, value, expiration, str(self._dht.peer_id)) for uid in self._uids]
        if not self.prefix.startswith("_"):  # such a prefix marks a private model
            items.append(Item(MODEL_REGISTRY_KEY, self._model, expiration, self.prefix))
        results = await self._dht.store_many(items)
        own = self._dht.peer_id
        report = AnnounceReport(
            state=state,
            records=len(items),
            acknowledged=sum(result.ok for result in results),
            by_others=sum(any(peer != own for peer in result.accepted) for result in results),
        )
        log.log(
            logging.INFO if report.ok else logging.WARNING,
            "announced %d blocks of %s as %s: %d of %d records kept, %d of them by other nodes",
            len(self._uids),
            self.prefix,
            state.name,
            report.acknowledged,
            report.records,
            report.by_others,
        )
        return report
