"""Runs of our averagers and stock ones: what they begin with, how they step together, what they should end with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import torch
import trio
from child_processes import Driver
from dht_pairs import Node, our_node

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging import Averager, StepResult
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.wire.averaging import code_name

PREFIX = "run"
SIZES = (1000, 7, 400_000)
QUICK = {"min_matchmaking_time": 3.0, "request_timeout": 1.5}


def values(seed: int, sizes: Sequence[int] = SIZES) -> list[torch.Tensor]:
    """What the averager of this number begins with, stock or ours."""
    return [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for size in sizes]


class OurPeer:
    def __init__(self, node: Node, peer: Peer, tensors: list[torch.Tensor], options: dict[str, Any]) -> None:
        self.node = node
        self.tensors = tensors
        self.averager = Averager(peer, tensors, **{"prefix": PREFIX} | options)
        self.result: StepResult | None = None

    @property
    def id(self) -> str:
        return str(self.node.host.peer_id)

    async def step(self, **arguments: Any) -> None:
        self.result = await self.averager.step(**arguments)


@asynccontextmanager
async def our_peer(
    seed: int,
    *,
    size: int,
    compression: str = "NONE",
    join: Sequence[str] = (),
    sizes: Sequence[int] = SIZES,
    wrapped: Callable[[Peer], Peer] = lambda peer: peer,
    **options: Any,
) -> AsyncIterator[OurPeer]:
    options = {
        "target_group_size": size,
        "matchmaking_seconds": 3.0,
        "request_seconds": 1.5,
        "compression": CompressionType[compression],
    } | options
    async with our_node(client_mode=options.get("client_mode", False)) as node:
        await node.join(join)
        with_calls = wrapped(Peer(node.host, node.server, node.client, node.dht))
        peer = OurPeer(node, with_calls, values(seed, sizes), options)
        async with peer.averager:
            yield peer


async def stock_peer(
    driver: Driver, addresses: list[str], seed: int, *, size: int, compression: str = "NONE", **options: Any
) -> dict[str, Any]:
    peer: dict[str, Any] = await driver.aask(
        "start",
        initial_peers=addresses,
        sizes=options.pop("sizes", SIZES),
        seed=-1 if options.pop("not_finite", False) else seed,
        prefix=PREFIX,
        compression=compression,
        held=options.pop("held", False),
        options=QUICK | {"target_group_size": size} | options,
    )
    return peer


def mean(weights: Mapping[int, float], sizes: Sequence[int] = SIZES) -> list[torch.Tensor]:
    """The exact weighted mean of the values of these seeds."""
    total = sum(weights.values())
    exact = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    for seed, weight in weights.items():
        for mean_of, theirs in zip(exact, values(seed, sizes), strict=True):
            mean_of.add_(theirs.double(), alpha=weight / total)
    return exact


def check(found: list[torch.Tensor], expected: list[torch.Tensor], compression: str) -> None:
    tolerance = {"NONE": 1e-6, "FLOAT16": 4e-3, "BLOCKWISE_8BIT": 0.1}[compression]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).abs().max() < tolerance


async def stock_values(driver: Driver, peer: dict[str, Any]) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in await driver.aask("values", averager=peer["averager"])]


class Mix:
    """Peers of one run, ours and stock ones; each begins with the values of its number."""

    def __init__(self, driver: Driver, nursery: trio.Nursery, first: OurPeer) -> None:
        self.ours = {0: first}
        self.stock: dict[int, dict[str, Any]] = {}
        self._driver = driver
        self._nursery = nursery

    @property
    def addresses(self) -> list[str]:
        return self.ours[0].node.host.addresses()

    async def add_ours(self, number: int, **options: Any) -> OurPeer:
        peer = await live_peer(self._nursery, number, join=self.addresses, **options)
        self.ours[number] = peer
        return peer

    async def add_stock(self, number: int, **options: Any) -> dict[str, Any]:
        self.stock[number] = peer = await stock_peer(self._driver, self.addresses, number, **options)
        return peer

    async def step(self, weights: dict[int, float | None]) -> dict[str, Any]:
        """All step at once; what they gathered is their number. Returns what everybody must have gathered."""
        for number, peer in self.stock.items():
            await self._driver.aask(
                "begin", averager=peer["averager"], weight=weights[number], gather={"number": number}
            )
        with trio.fail_after(60):
            async with trio.open_nursery() as steps:
                for number, ours in self.ours.items():
                    step = partial(ours.step, weight=weights[number], gather={"number": number}, timeout=40)
                    steps.start_soon(step)
        gathered = {peer.id: {"number": n} for n, peer in self.ours.items()}
        return gathered | {peer["peer"]: {"number": n} for n, peer in self.stock.items()}

    async def check(self, gathered: dict[str, Any], expected: list[torch.Tensor], compression: str) -> None:
        for ours in self.ours.values():
            assert ours.result is not None
            assert {str(peer): data for peer, data in ours.result.gathered.items()} == gathered
            assert_nothing_is_missing(ours.result)
            check(ours.tensors, expected, compression)
        for stock in self.stock.values():
            assert await self._driver.aask("step", averager=stock["averager"]) == gathered
            check(await stock_values(self._driver, stock), expected, compression)


def assert_nothing_is_missing(result: StepResult) -> None:
    assert not result.failed_senders
    assert not result.failed_reducers
    assert not result.missing_elements


async def live_peer(nursery: trio.Nursery, number: int, **options: Any) -> OurPeer:
    """One of ours that lives as long as ``nursery``."""

    async def live(task_status: trio.TaskStatus[OurPeer]) -> None:
        async with our_peer(number, **options) as peer:
            task_status.started(peer)
            await trio.sleep_forever()

    peer: OurPeer = await nursery.start(live)
    return peer


@asynccontextmanager
async def mixed(driver: Driver, **options: Any) -> AsyncIterator[Mix]:
    async with our_peer(0, **options) as first, trio.open_nursery() as nursery:
        yield Mix(driver, nursery, first)
        nursery.cancel_scope.cancel()


def words_of_leaders(peer: OurPeer) -> list[str]:
    """What leaders say to one of ours, from now on."""
    words: list[str] = []
    machine = peer.averager._meeting.machine
    original = machine.leader_said

    def leader_said(now: float, message: Any) -> Any:
        words.append(code_name(message.code))
        return original(now, message)

    machine.leader_said = leader_said  # type: ignore[method-assign]
    return words
