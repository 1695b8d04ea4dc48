"""Stock averagers that serve many tests, and swarms of some of them with some of ours."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trio
from averaging_mix import PREFIX, OurPeer, live_peer, values
from child_processes import Driver, PeerError
from dht_pairs import until

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import BridgeError
from kwaainet_bridge.hivemind.averaging import Step, StepResult
from kwaainet_bridge.hivemind.averaging.group_keys import entries_of, state_key
from kwaainet_bridge.hivemind.averaging.split import Part, partition, share_elements

SIZES = (3000, 7, 9000)
"""Elements of the tensors: a dozen parts of ``PART_BYTES`` in float32, so that of four members each has three."""
PART_BYTES = 4096


@dataclass(frozen=True)
class StockPeer:
    """One averager of the driver."""

    averager: int
    id: str


@dataclass
class Pool:
    """Stock averagers of one process. Those that are not in use do nothing."""

    driver: Driver
    addresses: list[str] = field(default_factory=list)

    def start(self, **options: Any) -> StockPeer:
        """``options`` are those of stock's DecentralizedAverager."""
        started = self.driver.ask(
            "start",
            initial_peers=self.addresses,
            sizes=SIZES,
            seed=0,
            prefix=PREFIX,
            options={
                "part_size_bytes": PART_BYTES,
                "allow_state_sharing": False,
            }
            | options,
        )
        self.addresses = self.addresses or started["addresses"]
        return StockPeer(started["averager"], started["peer"])


Outcome = StepResult | dict[str, Any] | BridgeError | PeerError
"""How a step ended: ours or a stock one that succeeded, ours or a stock one that failed."""


class Swarm:
    """Peers of one test by number, ours and stock ones; each begins with the values of its number."""

    def __init__(
        self,
        pool: Pool,
        nursery: trio.Nursery,
        *,
        size: int,
        least_size: int | None = None,
        matchmaking_seconds: float = 10.0,
        request_seconds: float = 3.0,
        part_seconds: float | None = None,
        compression: str = "NONE",
    ) -> None:
        """Groups begin when they have ``size`` members, or at their time with ``least_size``, by default no fewer.

        ``part_seconds`` is the patience of both sides with members that are late: ours leave one out that sends no part
        for so long; it is ``next_chunk_timeout`` of stock peers. By default theirs has no limit, and ours a minute.
        """
        self.ours: dict[int, OurPeer] = {}
        self.stock: dict[int, StockPeer] = {}
        self.bandwidths: dict[int, float | None] = {}
        self.clients: set[int] = set()
        self.compression = compression
        self._least_size = least_size or size
        self._seconds = matchmaking_seconds, request_seconds, part_seconds
        self._size = size
        self._pool = pool
        self.nursery = nursery
        self._options: dict[str, Any] = {
            "part_bytes": PART_BYTES,
            "min_group_size": self._least_size,
            "matchmaking_seconds": matchmaking_seconds,
            "request_seconds": request_seconds,
            "share_state": False,
            "part_seconds": 60.0 if part_seconds is None else part_seconds,
        }
        self._steps: dict[int, Step | None] = {}

    async def add_ours(self, number: int, **options: Any) -> OurPeer:
        self.ours[number] = peer = await self.our_peer(number, self.nursery, **options)
        return peer

    async def our_peer(self, number: int, nursery: trio.Nursery, **options: Any) -> OurPeer:
        """One of ours that lives as long as ``nursery`` and takes part in nothing by itself."""
        self.bandwidths[number] = options.get("bandwidth")
        if options.get("client_mode"):
            self.clients.add(number)
        return await live_peer(
            nursery,
            number,
            size=self._size,
            compression=self.compression,
            join=self._pool.addresses[:1],
            sizes=SIZES,
            **self._options | options,
        )

    async def use(
        self,
        number: int,
        peer: StockPeer,
        *,
        bandwidth: float | None = None,
        client_mode: bool = False,
    ) -> None:
        """Have one of the pool's take part. It is in client mode if it was started so."""
        self.stock[number] = peer
        self.bandwidths[number] = bandwidth
        if client_mode:
            self.clients.add(number)
        matchmaking, request, part = self._seconds
        await self._pool.driver.aask(
            "renew",
            averager=peer.averager,
            seed=number,
            size=self._size,
            least_size=self._least_size,
            matchmaking_time=matchmaking,
            request_timeout=request,
            compression=self.compression,
            chunk_timeout=part,
            bandwidth=bandwidth,
        )

    async def begin(
        self, *numbers: int, weights: Mapping[int, float] | None = None, timeout: float = 60.0, **stock: Any
    ) -> None:
        """Each gathers its number. ``stock`` goes to the stock ones' ``begin``."""
        for number in numbers:
            weight = None if weights is None else weights.get(number)
            gather = {"number": number}
            if number in self.ours:
                averager = self.ours[number].averager
                self._steps[number] = averager.begin(weight=weight, gather=gather, timeout=timeout)
            else:
                self._steps[number] = None
                await self._pool.driver.aask(
                    "begin",
                    averager=self.stock[number].averager,
                    weight=weight,
                    gather=gather,
                    timeout=timeout,
                    **stock,
                )

    async def declared(self, *peers: str) -> None:
        """Wait until others can see that these look for a group."""
        some = next(iter(self.ours.values()))

        async def looking() -> set[str]:
            found = entries_of(await some.node.dht.get(f"{PREFIX}.0b"))
            return {str(p) for p, entry in found if entry.value and entry.expiration > time.time()}

        await until(looking, set(peers).issubset)

    async def offered(self, *peers: str) -> None:
        """Wait until others can see that these share their states."""
        some = next(iter(self.ours.values()))

        async def sharing() -> set[str]:
            found = entries_of(await some.node.dht.get(state_key(PREFIX)))
            return {str(peer) for peer, entry in found if entry.value is not None}

        await until(sharing, set(peers).issubset)

    def id(self, number: int) -> str:
        return self.ours[number].id if number in self.ours else self.stock[number].id

    async def outcomes(self, *, within: float = 90.0) -> dict[int, Outcome]:
        """Wait for the steps that were begun."""
        found: dict[int, Outcome] = {}

        async def wait(number: int, step: Step | None) -> None:
            try:
                if step is not None:
                    found[number] = await step.result()
                else:
                    averager = self.stock[number].averager
                    found[number] = await self._pool.driver.aask("step", averager=averager)
            except (BridgeError, PeerError) as e:
                found[number] = e

        with trio.fail_after(within):
            async with trio.open_nursery() as nursery:
                for number, step in self._steps.items():
                    nursery.start_soon(wait, number, step)
        self._steps.clear()
        return found

    async def found_values(self, number: int) -> torch.Tensor:
        """All values of one peer, one after the other."""
        if number in self.ours:
            return torch.cat(self.ours[number].tensors)
        tensors = await self._pool.driver.aask("values", averager=self.stock[number].averager)
        return torch.cat([torch.tensor(v) for v in tensors])

    async def shares_of_stock(self, number: int) -> dict[int, int]:
        """How the group's last round was split, as this stock peer computed it."""
        shares = await self._pool.driver.aask("shares", averager=self.stock[number].averager)
        numbers = {self.id(n): n for n in (*self.ours, *self.stock)}
        return {numbers[peer]: share for peer, share in shares.items()}

    def layout(self, members: Sequence[int]) -> dict[int, list[Part]]:
        """What each member averages, if they are in this order."""
        numel = sum(SIZES)
        bandwidths = [0.0 if n in self.clients else self.bandwidths.get(n) for n in members]
        tensors = [torch.empty(size) for size in SIZES]
        parts = partition(
            tensors, share_elements(numel, bandwidths), CompressionType[self.compression], PART_BYTES
        )
        return dict(zip(members, parts, strict=True))


def members_of(outcome: Outcome) -> list[int]:
    """The group of a step that succeeded, by number, in the group's order."""
    assert isinstance(outcome, StepResult | dict), outcome
    gathered = outcome.gathered if isinstance(outcome, StepResult) else outcome
    return [data["number"] for data in gathered.values()]


def cut(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """The values of ``part`` in the tensors that ``whole`` has one after the other."""
    start = sum(SIZES[: part.tensor]) + part.start
    return whole[start : start + part.length]


def beginning(number: int) -> torch.Tensor:
    """All values that a peer of this number begins with."""
    return torch.cat(values(number, SIZES))


@asynccontextmanager
async def swarm_of(pool: Pool, **options: Any) -> AsyncIterator[Swarm]:
    try:
        async with trio.open_nursery() as nursery:
            yield Swarm(pool, nursery, **options)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await pool.driver.aask("cancel")
