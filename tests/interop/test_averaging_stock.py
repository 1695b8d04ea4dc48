"""Averaging in groups of our peers and stock Hivemind's, in every mix and role."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import trio
from averaging_mix import PREFIX, SIZES, check, mean, mixed, stock_values, values, words_of_leaders
from child_processes import Driver, PeerError
from dht_pairs import until
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge.errors import DeadlineExceeded
from kwaainet_bridge.hivemind.averaging.allreduce import AllReduce
from kwaainet_bridge.wire.averaging import AveragingData, MessageCode


@pytest.fixture(scope="module")
def driver(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("averaging_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver


@pytest.fixture
def stock_averagers(driver: Driver) -> Iterator[Driver]:
    yield driver
    driver.ask("shutdown")


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
    """It dies before it had our parts: the survivors average their own shares and keep their values for its.

    It sends none itself: a part of its that waited at the other stock peer would make that one's step fail.
    """
    async with mixed(stock_averagers, size=3) as mix:
        doomed = await mix.add_stock(1, size=3, held=True)
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
