"""Which blocks a new node should serve: stock Petals' choices, and what must hold for any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_fakes import peer
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.hivemind.client.block_choice import reason, suggest, summed, throughputs
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.wire.peer_id import PeerId

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "petals-block-choice.json").read_text())

A, B, C = map(peer, (1, 2, 3))

MODELS = st.integers(1, 24).flatmap(
    lambda total: st.tuples(
        st.lists(
            st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.5, 100.0]), min_size=total, max_size=total), max_size=3
        ),
        st.integers(1, total),
        st.just(total),
    )
)


def span(blocks: range, throughput: float, state: ServerState = ServerState.ONLINE, who: PeerId = A) -> Span:
    return Span(who, blocks, ServerInfo(state, throughput))


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_the_choices_of_stock_petals(case: dict[str, Any]) -> None:
    spans = [
        span(
            range(*told["blocks"]), told["throughput"], ServerState[told["state"]], PeerId.parse(told["peer"])
        )
        for told in case["servers"]
    ]
    network = throughputs(spans, case["total"])
    assert suggest([network], case["size"], case["total"]) == range(*case["chosen"])


def test_the_choices_are_of_many_kinds() -> None:
    sizes = {case["size"] == case["total"] for case in CASES}
    assert sizes == {True, False}
    assert sum(case["chosen"][0] > 0 for case in CASES) > 50
    assert any(server["state"] == "JOINING" for case in CASES for server in case["servers"])


@given(MODELS)
def test_what_is_suggested_lies_in_the_model_and_has_the_size_asked_for(model: Any) -> None:
    coverages, size, total = model
    blocks = suggest(coverages, size, total)
    assert len(blocks) == size
    assert 0 <= blocks.start < blocks.stop <= total


@given(MODELS)
def test_as_many_holes_as_possible_are_filled(model: Any) -> None:
    coverages, size, total = model
    totals = summed(coverages, total)

    def holes(blocks: range) -> int:
        return sum(totals[block] == 0 for block in blocks)

    best = max(holes(range(start, start + size)) for start in range(total - size + 1))
    assert holes(suggest(coverages, size, total)) == best


@given(MODELS)
def test_no_other_choice_has_a_weaker_block(model: Any) -> None:
    coverages, size, total = model
    totals = summed(coverages, total)
    assert min(totals[block] for block in suggest(coverages, size, total)) == min(totals)


@given(MODELS)
def test_the_order_of_networks_and_networks_without_servers_change_nothing(model: Any) -> None:
    coverages, size, total = model
    expected = suggest(coverages, size, total)
    assert suggest([[0.0] * total, *coverages], size, total) == expected
    if len(coverages) == 2:  # three sums in another order may round otherwise
        assert suggest(coverages[::-1], size, total) == expected


def test_a_block_that_one_network_lacks_counts_by_what_the_other_has() -> None:
    petals, kwaainet = (5.0, 5.0, 0.0, 0.0), (0.0, 0.0, 9.0, 0.0)
    assert suggest([petals, kwaainet], 1, 4) == range(3, 4)
    assert suggest([petals], 1, 4) == range(2, 3)
    assert suggest([kwaainet], 2, 4) == range(2)


def test_an_empty_swarm_begins_at_block_0_and_a_large_node_gets_the_whole_model() -> None:
    assert suggest([], 3, 8) == range(3)
    assert suggest([[0.0] * 8], 100, 8) == range(8)


@pytest.mark.parametrize(("fit", "model"), [(0, 8), (-1, 8), (1, 0)])
def test_nothing_can_be_suggested_for_no_block(fit: int, model: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        suggest([], fit, model)


def test_servers_that_join_count_and_those_that_are_offline_do_not() -> None:
    spans = [
        span(range(4), 2.0, who=A),
        span(range(2, 6), 3.0, ServerState.JOINING, B),
        span(range(8), 50.0, ServerState.OFFLINE, C),
    ]
    assert throughputs(spans, 8) == (2.0, 2.0, 5.0, 5.0, 3.0, 3.0, 0.0, 0.0)


def test_a_server_that_joins_and_has_measured_nothing_is_better_than_none_and_worse_than_any_other() -> None:
    spans = [span(range(2), 0.0, ServerState.JOINING), span(range(2, 4), 0.001, who=B)]
    assert suggest([throughputs(spans, 5)], 1, 5) == range(4, 5)
    assert suggest([throughputs(spans, 4)], 1, 4) == range(1)
    assert throughputs([span(range(1), 0.0)], 1) == (0.0,)  # one that is online and says 0 wants nobody


@pytest.mark.parametrize(
    ("totals", "blocks", "words"),
    [
        ((0, 0, 0, 0), range(2), "nobody serves any block of the model"),
        ((1, 0, 0, 1), range(1, 3), "nobody serves 1:3"),
        ((0, 1, 0, 1), range(3), "nobody serves 0:1, 2:3"),
        ((2, 1, 3, 4), range(4), "it is the whole model"),
        ((2, 1.25, 3, 4), range(2), "no other choice has a weaker block: 1.25 requests a second"),
    ],
)
def test_reasons(totals: Any, blocks: range, words: str) -> None:
    assert reason([totals], blocks, 4).startswith(words)
