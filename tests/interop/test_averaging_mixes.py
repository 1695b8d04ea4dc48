"""Groups of two to eight, ours and stock in every mix and role, each compression, and given bandwidths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from averaging_bounds import average_bound, member_bound
from averaging_mix import assert_nothing_is_missing, words_of_leaders
from averaging_pool import SIZES, Pool, Swarm, beginning, cut, members_of, swarm_of
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging import StepResult
from kwaainet_bridge.hivemind.averaging.split import share_elements

NODES = 5


class Stock:
    """Stock peers for all tests here: nodes, one in client mode, an auxiliary one."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.nodes = [pool.start() for _ in range(NODES)]
        self.client = pool.start(client_mode=True)
        self.auxiliary = pool.start(auxiliary=True)


@pytest.fixture(scope="module")
def stock_peers(stock: StockEnvironment) -> Iterator[Stock]:
    with stock.script("averaging_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield Stock(Pool(driver))


async def check(swarm: Swarm, outcomes: Mapping[int, Any], weights: Mapping[int, float]) -> None:
    """All took part, lost nothing, and end as near to the exact mean as the compression permits."""
    compression = CompressionType[swarm.compression]
    members = members_of(next(iter(outcomes.values())))
    assert sorted(members) == sorted(weights)
    for outcome in outcomes.values():
        assert members_of(outcome) == members
        if isinstance(outcome, StepResult):
            assert_nothing_is_missing(outcome)
    before = {number: beginning(number).double() for number in members}
    found = {number: (await swarm.found_values(number)).double() for number in members}
    total = sum(weights.values())
    for owner, parts in swarm.layout(members).items():
        for part in parts:
            began = {number: cut(values, part) for number, values in before.items()}
            ended = {number: cut(values, part) for number, values in found.items()}
            exact = torch.stack([weights[n] / total * values for n, values in began.items()]).sum(0)
            bound = average_bound(began, weights, owner, compression)
            assert ((ended[owner] - exact).abs() <= bound).all()
            for number in members:
                if number != owner:
                    bound = member_bound(began, number, ended[owner], compression)
                    assert ((ended[number] - ended[owner]).abs() <= bound).all()


MIXES = [  # ours, stock: each size; ours, stock ones or neither in the majority
    *[(1, 1), (2, 1), (1, 3), (3, 2), (3, 3), (2, 5), (5, 3), (4, 4)],
]


@pytest.mark.parametrize(("ours", "theirs"), MIXES)
async def test_groups_of_every_size_and_mix(stock_peers: Stock, ours: int, theirs: int) -> None:
    await whole_group(stock_peers, ours, theirs, "NONE")


@pytest.mark.parametrize("compression", [c.name for c in CompressionType if c != CompressionType.NONE])
async def test_every_compression_in_a_group_of_two_and_two(stock_peers: Stock, compression: str) -> None:
    await whole_group(stock_peers, 2, 2, compression)


async def whole_group(stock_peers: Stock, ours: int, theirs: int, compression: str) -> None:
    size = ours + theirs
    weights = {number: 1.0 + number % 3 for number in range(size)}
    async with swarm_of(stock_peers.pool, size=size, compression=compression) as swarm:
        for number in range(ours):
            await swarm.add_ours(number)
        others = [*stock_peers.nodes, stock_peers.auxiliary]
        for number in range(ours, size):
            await swarm.use(number, others[number - ours])
        await swarm.begin(*range(size), weights=weights)
        await check(swarm, await swarm.outcomes(), weights)


@pytest.mark.parametrize("leader", ["ours", "stock"])
async def test_either_side_leads_both(stock_peers: Stock, leader: str) -> None:
    weights = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    async with swarm_of(stock_peers.pool, size=4) as swarm:
        words = [words_of_leaders(await swarm.add_ours(number)) for number in (0, 1)]
        for number in (2, 3):
            await swarm.use(number, stock_peers.nodes[number])
        first = {"ours": 0, "stock": 2}[leader]
        await swarm.begin(first, weights=weights)
        await swarm.declared(swarm.id(first))
        await swarm.begin(*({0, 1, 2, 3} - {first}), weights=weights)
        await check(swarm, await swarm.outcomes(), weights)
        followed = ["ACCEPTED", "BEGIN_ALLREDUCE"]
        # whoever was led to another peer first came to the leader in the end
        assert words[1][-2:] == followed
        assert words[0][-2:] == ([] if leader == "ours" else followed)


async def test_all_roles_of_both_sides_in_one_group(stock_peers: Stock) -> None:
    """Two nodes, a client and an auxiliary peer of either side."""
    weights = {0: 1.0, 1: 2.0, 2: 3.0, 3: 0.0, 4: 5.0, 5: 1.0, 6: 2.0, 7: 0.0}
    async with swarm_of(stock_peers.pool, size=8) as swarm:
        for number, role in enumerate(({}, {}, {"client_mode": True}, {"auxiliary": True})):
            await swarm.add_ours(number, **role)
        for number, peer in enumerate(stock_peers.nodes[:2], 4):
            await swarm.use(number, peer)
        await swarm.use(6, stock_peers.client, client_mode=True)
        await swarm.use(7, stock_peers.auxiliary)
        await swarm.begin(*range(8), weights={n: w for n, w in weights.items() if w})
        outcomes = await swarm.outcomes()
        layout = swarm.layout(members_of(outcomes[0]))
        assert not layout[2]
        assert not layout[6]
        assert layout[3]
        assert layout[7]
        await check(swarm, outcomes, weights)


@pytest.mark.parametrize(
    "bandwidths", [(50.0, 100.0, 14.4, None), (100.0, None, 30.0, 0.0), (0.0, None, None, 0.0)]
)
async def test_given_bandwidths_split_the_work_alike_on_both_sides(
    stock_peers: Stock, bandwidths: tuple[float | None, ...]
) -> None:
    """Ours have the first and the third."""
    weights = dict.fromkeys(range(4), 1.0)
    async with swarm_of(stock_peers.pool, size=4) as swarm:
        for number, bandwidth in enumerate(bandwidths):
            if number % 2 == 0:
                await swarm.add_ours(number, bandwidth=bandwidth)
            else:
                await swarm.use(number, stock_peers.nodes[number], bandwidth=bandwidth)
        await swarm.begin(*range(4), weights=weights)
        outcomes = await swarm.outcomes()
        await check(swarm, outcomes, weights)
        members = members_of(outcomes[0])
        numel = sum(SIZES)
        shares = await swarm.shares_of_stock(1)
        assert shares == await swarm.shares_of_stock(3)
        assert tuple(shares.values()) == share_elements(numel, [bandwidths[number] for number in members])
        assert all(shares[number] == 0 for number in range(4) if bandwidths[number] == 0)
        layout = swarm.layout(members)
        for number, parts in layout.items():
            averaged = sum(part.length for part in parts)
            assert abs(averaged - shares[number]) <= 2048  # the parts at both ends of a share are whole
            if number in swarm.ours:
                # it sends all that it does not average, and three others an answer for what it does
                outcome = outcomes[number]
                assert isinstance(outcome, StepResult)
                assert outcome.sent_bytes == 4 * (numel - averaged + 3 * averaged)
