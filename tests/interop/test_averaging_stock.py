"""Averaging in groups of our peers and stock Hivemind's, in every mix and role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
import trio
from child_processes import Driver, PeerError
from dht_pairs import Node, our_node, until
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import DeadlineExceeded
from kwaainet_bridge.hivemind.averaging import Averager, StepResult
from kwaainet_bridge.hivemind.averaging.allreduce import AllReduce
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.wire.averaging import AveragingData, MessageCode, code_name

PREFIX = "run"
SIZES = (1000, 7, 400_000)
QUICK = {"min_matchmaking_time": 3.0, "request_timeout": 1.5}


@pytest.fixture(scope="module")
def driver(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("averaging_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver


@pytest.fixture
def stock_averagers(driver: Driver) -> Iterator[Driver]:
    yield driver
    driver.ask("shutdown")


def values(seed: int) -> list[torch.Tensor]:
    """What a stock averager begins with."""
    return [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for size in SIZES]


class OurPeer:
    def __init__(self, node: Node, tensors: list[torch.Tensor], options: dict[str, Any]) -> None:
        self.node = node
        self.tensors = tensors
        peer = Peer(node.host, node.server, node.client, node.dht)
        self.averager = Averager(peer, tensors, prefix=PREFIX, **options)
        self.result: StepResult | None = None

    async def step(self, **arguments: Any) -> None:
        self.result = await self.averager.step(**arguments)


@asynccontextmanager
async def our_peer(
    seed: int, *, size: int, compression: str = "NONE", join: Sequence[str] = (), **options: Any
) -> AsyncIterator[OurPeer]:
    options = {
        "target_group_size": size,
        "matchmaking_seconds": 3.0,
        "request_seconds": 1.5,
        "compression": CompressionType[compression],
    } | options
    async with our_node(client_mode=options.get("client_mode", False)) as node:
        await node.join(join)
        peer = OurPeer(node, values(seed), options)
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
        options=QUICK | {"target_group_size": size} | options,
    )
    return peer


def mean(weights: dict[int, float]) -> list[torch.Tensor]:
    """The exact weighted mean of the values of these seeds."""
    total = sum(weights.values())
    exact = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    for seed, weight in weights.items():
        for mean_of, theirs in zip(exact, values(seed), strict=True):
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

    def __init__(self, driver: Driver, first: OurPeer, nursery: trio.Nursery) -> None:
        self.ours = {0: first}
        self.stock: dict[int, dict[str, Any]] = {}
        self._driver = driver
        self._nursery = nursery

    @property
    def addresses(self) -> list[str]:
        return self.ours[0].node.host.addresses()

    async def add_ours(self, number: int, **options: Any) -> OurPeer:
        async def live(task_status: trio.TaskStatus[OurPeer]) -> None:
            async with our_peer(number, join=self.addresses, **options) as peer:
                task_status.started(peer)
                await trio.sleep_forever()

        peer: OurPeer = await self._nursery.start(live)
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
        gathered = {str(peer.node.host.peer_id): {"number": n} for n, peer in self.ours.items()}
        return gathered | {peer["peer"]: {"number": n} for n, peer in self.stock.items()}

    async def check(self, gathered: dict[str, Any], expected: list[torch.Tensor], compression: str) -> None:
        for ours in self.ours.values():
            assert ours.result is not None
            assert {str(peer): data for peer, data in ours.result.gathered.items()} == gathered
            assert not ours.result.failed_senders
            assert not ours.result.failed_reducers
            assert not ours.result.missing_elements
            check(ours.tensors, expected, compression)
        for stock in self.stock.values():
            assert await self._driver.aask("step", averager=stock["averager"]) == gathered
            check(await stock_values(self._driver, stock), expected, compression)


@asynccontextmanager
async def mixed(driver: Driver, **options: Any) -> AsyncIterator[Mix]:
    async with our_peer(0, **options) as first, trio.open_nursery() as nursery:
        yield Mix(driver, first, nursery)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("compression", ["NONE", "FLOAT16", "BLOCKWISE_8BIT"])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (2, 2), (3, 1), (1, 3)])
async def test_all_members_end_with_the_weighted_mean(
    stock_averagers: Driver, ours: int, theirs: int, compression: str
) -> None:
    size = ours + theirs
    weights = {number: 1.0 + number for number in range(size)}
    async with mixed(stock_averagers, size=size, compression=compression) as mix:
        for number in range(1, ours):
            await mix.add_ours(number, size=size, compression=compression)
        for number in range(ours, size):
            await mix.add_stock(number, size=size, compression=compression)
        await mix.check(await mix.step(weights), mean(weights), compression)


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


async def test_ours_leads_stock_peers(stock_averagers: Driver) -> None:
    """Ours declares first, so that the stock peers ask it."""
    weights = {0: 1.0, 1: 2.0, 2: 5.0}
    async with mixed(stock_averagers, size=3) as mix:
        await mix.add_stock(1, size=3)
        await mix.add_stock(2, size=3)
        ours = mix.ours[0]
        words = words_of_leaders(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(ours.step, weight=weights[0], timeout=40))
            await until(partial(ours.node.dht.get, f"{PREFIX}.0b"), lambda found: found is not None)
            for number, stock in mix.stock.items():
                await stock_averagers.aask("begin", averager=stock["averager"], weight=weights[number])
        assert words == []
        check(ours.tensors, mean(weights), "NONE")
        for stock in mix.stock.values():
            assert len(await stock_averagers.aask("step", averager=stock["averager"])) == 3
            check(await stock_values(stock_averagers, stock), mean(weights), "NONE")


async def test_ours_follows_a_stock_leader(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2) as mix:
        stock = await mix.add_stock(1, size=2)
        words = words_of_leaders(mix.ours[0])
        await stock_averagers.aask("begin", averager=stock["averager"])
        await until(partial(mix.ours[0].node.dht.get, f"{PREFIX}.0b"), lambda found: found is not None)
        await mix.ours[0].step(timeout=40)
        assert words == ["ACCEPTED", "BEGIN_ALLREDUCE"]
        check(mix.ours[0].tensors, mean({0: 1.0, 1: 1.0}), "NONE")


async def test_rounds_follow_each_other_with_the_same_group_bits(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2, bits="0") as mix:
        stock = await mix.add_stock(1, size=2, initial_group_bits="0")
        await mix.check(await mix.step({0: 1.0, 1: 1.0}), mean({0: 1.0, 1: 1.0}), "NONE")
        bits = {
            mix.ours[0].averager.group_bits,
            await stock_averagers.aask("bits", averager=stock["averager"]),
        }
        assert bits == {"0", "1"}  # a group of two parts


# --- roles ------------------------------------------------------------------------------------------------


async def test_ours_in_client_mode(stock_averagers: Driver) -> None:
    weights: dict[int, float] = {0: 1.0, 1: 2.0, 2: 3.0}
    async with mixed(stock_averagers, size=3) as mix:
        await mix.add_stock(1, size=3)
        await mix.add_ours(2, size=3, client_mode=True)
        await mix.check(await mix.step(dict(weights)), mean(weights), "NONE")


async def test_a_stock_peer_in_client_mode(stock_averagers: Driver) -> None:
    weights: dict[int, float] = {0: 1.0, 1: 2.0, 2: 3.0}
    async with mixed(stock_averagers, size=3) as mix:
        await mix.add_stock(1, size=3, client_mode=True)
        await mix.add_ours(2, size=3)
        await mix.check(await mix.step(dict(weights)), mean(weights), "NONE")


async def test_ours_as_an_auxiliary_peer(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=3) as mix:
        await mix.add_stock(1, size=3)
        await mix.add_ours(2, size=3, auxiliary=True)
        gathered = await mix.step({0: 1.0, 1: 3.0, 2: None})
        await mix.check(gathered, mean({0: 1.0, 1: 3.0}), "NONE")


async def test_a_stock_auxiliary_peer(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=3) as mix:
        await mix.add_stock(1, size=3, auxiliary=True)
        await mix.add_ours(2, size=3)
        gathered = await mix.step({0: 1.0, 1: None, 2: 3.0})
        await mix.check(gathered, mean({0: 1.0, 2: 3.0}), "NONE")


# --- state ------------------------------------------------------------------------------------------------


async def test_a_stock_peer_loads_our_state(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2, bits="0110") as mix:
        stock = await mix.add_stock(1, size=2, allow_state_sharing=False)
        mix.ours[0].averager.share_state(allowed=True, priority=5.0)
        loaded = await stock_averagers.aask("load", averager=stock["averager"])
        assert loaded["metadata"] == {"group_key": "0110"}
        for theirs, ours in zip(loaded["tensors"], values(0), strict=True):
            assert torch.equal(torch.tensor(theirs), ours)


async def test_we_load_a_stock_peers_state(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2, share_state=False) as mix:
        await mix.add_stock(1, size=2, initial_group_bits="10")
        averager = mix.ours[0].averager
        state = await until(averager.load_state_from_peers, lambda found: found is not None)
        assert state is not None
        assert state.metadata == {"group_key": "10"}
        for theirs, expected in zip(state.tensors, values(1), strict=True):
            assert torch.equal(theirs, expected)


async def test_nobody_gives_a_state_that_is_not_shared(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2, share_state=False) as mix:
        stock = await mix.add_stock(1, size=2, allow_state_sharing=False)
        assert await stock_averagers.aask("load", averager=stock["averager"]) is None
        assert await mix.ours[0].averager.load_state_from_peers() is None


# --- faults -----------------------------------------------------------------------------------------------


async def test_groups_of_other_tensors_stay_apart(stock_averagers: Driver) -> None:
    async with mixed(stock_averagers, size=2) as mix:
        await mix.add_stock(1, size=2, sizes=[5])
        await stock_averagers.aask("begin", averager=mix.stock[1]["averager"], timeout=8.0)
        with pytest.raises(DeadlineExceeded):
            await mix.ours[0].averager.step(timeout=8)
        with pytest.raises(PeerError):
            await stock_averagers.aask("step", averager=mix.stock[1]["averager"])


async def test_a_member_that_averages_nothing_costs_the_others_its_share(stock_averagers: Driver) -> None:
    """Of two of ours and a stock peer, one of ours refuses all parts: the others go on, stock and ours alike."""
    async with mixed(stock_averagers, size=3) as mix:
        stock = await mix.add_stock(1, size=3)
        bad = await mix.add_ours(2, size=3)
        method = bad.averager._methods.aggregate_part
        bad.node.server.unmount(method)

        async def refuse(stream: Any) -> None:
            await stream.receive()
            await stream.send(AveragingData(code=MessageCode.INTERNAL_ERROR))

        bad.node.server.mount_stream(method, refuse)
        gathered = await mix.step({0: 1.0, 1: 1.0, 2: 1.0})
        result = mix.ours[0].result
        assert result is not None
        assert list(result.failed_reducers) == [bad.node.host.peer_id]
        assert result.missing_elements > 0
        assert await stock_averagers.aask("step", averager=stock["averager"]) == gathered
        exact = torch.cat(mean({0: 1.0, 1: 1.0, 2: 1.0}))
        kept = {}
        for number, tensors in ((0, mix.ours[0].tensors), (1, await stock_values(stock_averagers, stock))):
            found, before = torch.cat(tensors), torch.cat(values(number))
            kept[number] = (found - exact).abs() > 1e-5
            assert torch.equal(found[kept[number]], before[kept[number]])
        assert abs(int(kept[0].sum()) - result.missing_elements) < 20
        assert abs(int(kept[1].sum()) - result.missing_elements) < 20


async def test_a_sender_that_spoils_its_values_is_left_out(stock_averagers: Driver) -> None:
    """A stock peer sends values that are not finite: our share holds none of them."""
    async with mixed(stock_averagers, size=3) as mix:
        bad = await mix.add_stock(1, size=3, not_finite=True)
        await mix.add_ours(2, size=3)
        await mix.step({0: 1.0, 1: 1.0, 2: 1.0})
        for peer in mix.ours.values():
            assert peer.result is not None
            assert {str(sender) for sender in peer.result.failed_senders} == {bad["peer"]}
            assert {str(reducer) for reducer in peer.result.failed_reducers} == {bad["peer"]}
            assert all(bool(torch.isfinite(tensor).all()) for tensor in peer.tensors)


async def test_a_stock_peer_that_is_killed_in_the_middle(
    stock_averagers: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before it had our parts: the survivors average their own shares and keep their values for its."""
    async with mixed(stock_averagers, size=3) as mix:
        doomed = await mix.add_stock(1, size=3)
        # as in stock optimizers; without it a stock peer waits for ever for a sender that never came
        stock = await mix.add_stock(2, size=3, next_chunk_timeout=15.0)
        original = AllReduce.run

        async def kill_and_run(self: AllReduce, client: Any, method: Any) -> None:
            await stock_averagers.aask("kill", averager=doomed["averager"])
            await original(self, client, method)

        monkeypatch.setattr(AllReduce, "run", kill_and_run)
        gathered = await mix.step({0: 1.0, 1: 1.0, 2: 1.0})
        result = mix.ours[0].result
        assert result is not None
        assert {str(peer) for peer in result.failed_reducers} == {doomed["peer"]}
        assert 0 < result.missing_elements < sum(SIZES)
        assert await stock_averagers.aask("step", averager=stock["averager"]) == gathered
        ours, theirs = (torch.cat(mix.ours[0].tensors), torch.cat(await stock_values(stock_averagers, stock)))
        differ = (ours - theirs).abs() > 1e-5
        assert abs(int(differ.sum()) - result.missing_elements) < 20
        assert torch.equal(ours[differ], torch.cat(values(0))[differ])
        assert torch.equal(theirs[differ], torch.cat(values(2))[differ])
