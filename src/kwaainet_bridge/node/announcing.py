"""Telling the swarms what this node serves: one truth, a record builder for each network.

Source of the Petals side: Petals main ``utils/dht.py`` and ``server/server.py``; of the KwaaiNet side: KwaaiNet v0.6.2.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.hivemind.dht import DhtNode, Item, StoreResult
from kwaainet_bridge.hivemind.experts.records import MODEL_REGISTRY_KEY, ServerInfo, ServerState, block_uid
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.kwaai import records as kwaai
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_HUB_PAGE = "https://huggingface.co/"  # what stock servers prefix the repository with; monitors link to it


@dataclass(slots=True)
class Offer:
    """What this node serves: the one truth that all records are made of. Change it as facts change.

    ``cache_tokens`` tells the tokens that one block's KV cache has room for, None before it is known.
    """

    blocks: range
    model_blocks: int
    repository: str | None
    torch_dtype: str
    public_name: str | None = None
    adapters: tuple[str, ...] = ()
    quantization: str = "none"
    throughput: Throughput = Throughput(0.0)  # noqa: RUF009 - it is frozen
    using_relay: bool = False
    cache_tokens: Callable[[], int | None] = lambda: None


@dataclass(frozen=True, slots=True)
class AnnounceReport:
    """How one round in one network went.

    ``acknowledged`` records are kept by some node, ``by_others`` by one that is not this one. ``peers`` are the other
    nodes that were asked: how many records each keeps, or why it gave no answer.
    """

    network: str
    state: ServerState
    records: int
    acknowledged: int
    by_others: int
    peers: dict[PeerId, int | str]
    lifetime: float
    """Seconds until the records expire."""

    @property
    def ok(self) -> bool:
        return self.acknowledged == self.records

    @property
    def told_by_peers(self) -> str:
        """What each peer answered: ``…abcdef keeps 9, …123456: no answer within 5 s``."""
        told = (
            f"{peer.short} keeps {answer}" if isinstance(answer, int) else f"{peer.short}: {answer}"
            for peer, answer in self.peers.items()
        )
        return ", ".join(told) or "no other node was asked"


class Publisher(Protocol):
    """Writes an offer as one network reads it."""

    network: str
    prefix: str
    """What the blocks are called there."""
    own: PeerId
    lifetime: float
    """Seconds until a record expires."""

    def items(self, offer: Offer, state: ServerState, expiration: float) -> list[Item]: ...

    async def store(self, items: Sequence[Item]) -> list[StoreResult]: ...


class PetalsPublisher:
    """Records of a Petals server, at the nodes nearest to their keys."""

    network = "petals"
    lifetime = defaults.ANNOUNCE_LIFETIME_PERIODS * defaults.ANNOUNCE_PERIOD_SECONDS

    def __init__(self, dht: DhtNode, prefix: str) -> None:
        self.prefix = prefix
        self.own = dht.peer_id
        self._dht = dht

    def items(self, offer: Offer, state: ServerState, expiration: float) -> list[Item]:
        tokens = offer.cache_tokens()
        info = ServerInfo(
            state=state,
            throughput=offer.throughput.overall,
            start_block=offer.blocks.start,
            end_block=offer.blocks.stop,
            public_name=offer.public_name,
            version=f"kwaainet-bridge {__version__}",
            network_rps=offer.throughput.network_rps,
            forward_rps=offer.throughput.forward_rps,
            inference_rps=offer.throughput.inference_rps,
            adapters=offer.adapters,
            torch_dtype=offer.torch_dtype,
            quant_type=offer.quantization,
            using_relay=offer.using_relay,
            # this number counts keys and values apart, as stock clients expect
            cache_tokens_left=None if tokens is None else 2 * tokens,
        )
        value, own = info.to_value(), str(self.own)
        items = [Item(block_uid(self.prefix, block), value, expiration, own) for block in offer.blocks]
        if not self.prefix.startswith("_"):  # such a prefix marks a private model
            page = f"{_HUB_PAGE}{offer.repository}" if offer.repository else None
            model = {"num_blocks": offer.model_blocks, "repository": page}
            items.append(Item(MODEL_REGISTRY_KEY, model, expiration, self.prefix))
        return items

    async def store(self, items: Sequence[Item]) -> list[StoreResult]:
        return await self._dht.store_many(items)


class KwaaiPublisher:
    """Records of a KwaaiNet node, at every one of its network's bootstrap peers: they do not pass records on."""

    network = "kwaainet"
    lifetime = defaults.KWAAI_RECORD_SECONDS

    def __init__(
        self, dht: DhtNode, prefix: str, bootstrap: Callable[[], Sequence[PeerId]], *, leases: bool
    ) -> None:
        self.prefix = prefix
        self.own = dht.peer_id
        self._dht = dht
        self._bootstrap = bootstrap
        self._leases = leases

    def items(self, offer: Offer, state: ServerState, expiration: float) -> list[Item]:
        info = kwaai.NodeInfo(
            peer=self.own,
            state=int(state),
            throughput=offer.throughput.overall,
            start_block=offer.blocks.start,
            end_block=offer.blocks.stop,
            public_name=offer.public_name or "",
            torch_dtype=offer.torch_dtype,
            using_relay=offer.using_relay,
            cache_tokens_left=offer.cache_tokens() or 0,
            leases=self._leases,
        )
        value, own = info.to_value(), str(self.own)
        items = [Item(block_uid(self.prefix, block), value, expiration, own) for block in offer.blocks]
        model = {"repository": offer.repository or "", "num_blocks": offer.model_blocks}
        items.append(Item(kwaai.MODEL_REGISTRY_KEY, model, expiration, self.prefix))
        items.append(Item(kwaai.NODES_KEY, value, expiration, own))
        return items

    async def store(self, items: Sequence[Item]) -> list[StoreResult]:
        return await self._dht.store_at(self._bootstrap(), items)


class Announcer:
    """Keeps an offer's records in the networks: at once on a change, and renewed by :meth:`run`.

    While the node is not ``dialable``, or ``paused`` says that it takes no work, blocks are not announced, or withdrawn
    if they were: announce anew when that changes.
    ``on_report`` hears how each round went in each network, unless a later one has begun there meanwhile.
    """

    def __init__(
        self,
        offer: Offer,
        publishers: Sequence[Publisher],
        *,
        on_report: Callable[[AnnounceReport], None] = lambda _report: None,
        paused: Callable[[], bool] = lambda: False,
        period: float = defaults.ANNOUNCE_PERIOD_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.offer = offer
        self._paused = paused
        self.dialable = True
        self.wanted = ServerState.OFFLINE
        self._publishers = tuple(publishers)
        self._on_report = on_report
        self._period = period
        self._clock = clock
        self._announced = False
        self._times = 0
        self._expirations: dict[str, float] = {}

    @property
    def own(self) -> PeerId:
        """This node, as its records name it."""
        return self._publishers[0].own

    async def run(self) -> None:
        """Renew the records every period until cancelled, beginning one period from now."""
        while True:
            await trio.sleep(self._period)
            await self.announce(self.wanted)

    async def announce(self, state: ServerState) -> list[AnnounceReport]:
        """Store the records with ``state`` now and keep renewing them so; OFFLINE instead while not dialable
        or paused.

        All networks at once. Nothing is stored to withdraw records that never were: no report then. Returns once every
        node asked has answered or failed. Never raises for peers. Cancelled: some may have been stored.
        """
        self.wanted = state
        if self._paused():
            state = ServerState.OFFLINE
        elif not self.dialable:
            log.warning("blocks are not announced: nobody can dial this node")
            state = ServerState.OFFLINE
        if state is ServerState.OFFLINE and not self._announced:
            return []
        if state is not ServerState.OFFLINE:
            self._announced, self._times = True, self._times + 1
        reports: list[AnnounceReport] = []
        offer, times = self.offer, self._times

        async def publish(publisher: Publisher, expiration: float) -> None:
            reports.append(await self._publish(publisher, offer, state, expiration))

        try:
            async with trio.open_nursery() as nursery:
                for publisher in self._publishers:
                    nursery.start_soon(publish, publisher, self._next_expiration(publisher))
        finally:
            # not before: this round may be cancelled, and whoever withdraws them then has to do it anew
            if state is ServerState.OFFLINE and self._times == times:
                self._announced = False
        return reports

    def replace(self, offer: Offer) -> None:
        """Announce other blocks from now on. ValueError unless what was announced is withdrawn."""
        if self._announced:
            raise ValueError("the blocks that are announced must be withdrawn first")
        offer.using_relay = self.offer.using_relay
        self.offer = offer
        self.wanted = ServerState.OFFLINE

    def _next_expiration(self, publisher: Publisher) -> float:
        """When records of a round that begins now expire: a record replaces another only if it expires later."""
        least = math.nextafter(self._expirations.get(publisher.network, -math.inf), math.inf)
        expiration = max(self._clock() + publisher.lifetime, least)
        self._expirations[publisher.network] = expiration
        return expiration

    async def _publish(
        self, publisher: Publisher, offer: Offer, state: ServerState, expiration: float
    ) -> AnnounceReport:
        results = await publisher.store(publisher.items(offer, state, expiration))
        report = _report(publisher, state, results)
        log.log(
            logging.INFO if report.ok else logging.WARNING,
            "announced %d blocks in %s as %s: %d of %d records kept, %d of them by other nodes; %s",
            len(offer.blocks),
            publisher.network,
            state.name,
            report.acknowledged,
            report.records,
            report.by_others,
            report.told_by_peers,
        )
        if self._expirations[publisher.network] == expiration:  # else peers have refused it for a later one
            self._on_report(report)
        return report


def _report(publisher: Publisher, state: ServerState, results: Sequence[StoreResult]) -> AnnounceReport:
    peers: dict[PeerId, int | str] = {}
    for result in results:
        for peer in (*result.accepted, *result.refused):
            kept = peers.get(peer)
            peers[peer] = (kept if isinstance(kept, int) else 0) + (peer in result.accepted)
        for peer, why in result.failed.items():
            peers.setdefault(peer, why)
    peers.pop(publisher.own, None)
    return AnnounceReport(
        publisher.network,
        state,
        records=len(results),
        acknowledged=sum(result.ok for result in results),
        by_others=sum(any(peer != publisher.own for peer in result.accepted) for result in results),
        peers=peers,
        lifetime=publisher.lifetime,
    )
