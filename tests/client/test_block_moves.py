"""Whether a server should move to other blocks: stock Petals' judgements, and what must hold for any."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from client_fakes import peer
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.client.block_choice import Advice, advise, summed, throughputs
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.wire.peer_id import PeerId

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "petals-rebalancing.json").read_text())

ME, A, B, C = map(peer, range(4))


def span(start: int, end: int, who: PeerId, throughput: float = 1.0, state: str = "ONLINE") -> Span:
    return Span(who, range(start, end), ServerInfo(ServerState[state], throughput))


def advised(*networks: list[Span], own: Span, total: int = 8, quality: float = 0.75, **more: Any) -> Advice:
    return advise(networks, own, total, balance_quality=quality, shuffle=random.Random(1).shuffle, **more)


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_the_moves_of_stock_petals(case: dict[str, Any]) -> None:
    spans = [
        Span(
            PeerId.parse(told["peer"]),
            range(*told["blocks"]),
            ServerInfo(ServerState[told["state"]], told["throughput"]),
        )
        for told in case["servers"]
    ]
    own = next(span for span in spans if str(span.peer) == case["own"])
    others = [span for span in spans if span is not own]
    shuffle = random.Random(case["seed"]).shuffle
    advice = advise([others], own, case["total"], balance_quality=case["quality"], shuffle=shuffle)
    assert (advice.blocks != own.blocks) is case["moves"]
    if case["moves"]:
        assert advice.blocks == range(case["best"], case["best"] + len(own.blocks))


def test_the_moves_are_of_many_kinds() -> None:
    moved = [case for case in CASES if case["moves"]]
    stayed = [case for case in CASES if not case["moves"]]
    assert len(moved) > 40
    assert sum(case["best"] is None for case in stayed) > 30  # somebody would be cut off
    places = {
        case["best"] == server["blocks"][0]
        for case in stayed
        for server in case["servers"]
        if server["peer"] == case["own"] and case["best"] is not None
    }
    assert places == {True, False}  # the place is the best already, or a better one is not worth it
    assert {case["quality"] for case in moved} == {0.5, 0.75, 1.0}


def test_one_of_two_servers_on_the_same_blocks_goes_where_nobody_is() -> None:
    advice = advised([span(0, 4, A)], own=span(0, 4, ME))
    assert advice == Advice(range(4, 8), "the weakest block has 0 of 1 requests a second that are possible")


def test_who_is_alone_on_its_blocks_stays() -> None:
    assert advised([span(4, 8, A)], own=span(0, 4, ME)) == Advice(range(4), "nobody else serves 0:4")
    assert advised([span(2, 8, A)], own=span(0, 4, ME)).reason == "nobody else serves 0:2"
    assert advised([], own=span(0, 4, ME)) == Advice(range(4), "no other place needs it more")


def test_a_small_gain_moves_nobody() -> None:
    own, others = span(0, 4, ME, 10.0), [span(0, 4, A, 100.0), span(4, 8, B, 90.0)]
    advice = advised(others, own=own)
    assert advice == Advice(
        range(4), "the weakest block has 90 of 100 requests a second that are possible: enough"
    )
    assert advised(others, own=own, quality=1.0).blocks == range(4, 8)
    assert advised(others, own=own, quality=0.0).blocks == range(4)


def test_nobody_moves_where_all_is_even() -> None:
    own, others = span(0, 4, ME, 1.0), [span(0, 4, A, 1.0), span(4, 8, B, 1.0), span(4, 8, C, 1.0)]
    assert advised(others, own=own).blocks == range(4)


def test_networks_are_added_and_one_server_in_both_is_one() -> None:
    own = span(0, 4, ME)
    assert advised([span(0, 4, A)], [], own=own).blocks == range(4, 8)
    assert advised([span(0, 4, A)], [span(4, 8, B)], own=own).blocks == range(4)
    assert advised([], [span(0, 4, A)], own=own).blocks == range(4, 8)
    # that it may move at all is seen with both networks only: A serves what it would leave
    seen: list[int] = []
    advise(
        [[span(0, 4, A)], [span(0, 4, A), span(4, 6, B)]],
        own,
        8,
        balance_quality=0.75,
        shuffle=lambda servers: seen.append(len(servers)),
    )
    assert set(seen) == {3}


def test_servers_that_join_count_and_those_that_have_left_do_not() -> None:
    own = span(0, 4, ME)
    joining = span(4, 8, B, 0.0, "JOINING")
    assert advised([span(0, 4, A), joining], own=own).reason.startswith("the weakest block has 1e-06 of")
    assert advised([span(0, 4, A, state="OFFLINE")], own=own).blocks == range(4)
    assert advised([span(0, 4, A), span(4, 8, B, state="OFFLINE")], own=own).blocks == range(4, 8)


def test_a_simulation_without_end_is_given_up() -> None:
    advice = advised([span(0, 4, A)], own=span(0, 4, ME), most_moves=1)
    assert advice == Advice(range(4), "what the others would do then has no end")


def test_absurd_throughputs_are_survived_and_do_not_drown_the_others() -> None:
    flood = [span(0, 4, peer(number), 1.7e308) for number in range(4, 40)]
    assert advised([span(0, 4, A), *flood], own=span(0, 4, ME)).blocks == range(4, 8)
    assert advised([*flood, span(4, 8, A, 1e-300)], own=span(0, 4, ME, 1.7e308)).blocks == range(4, 8)
    assert throughputs([span(0, 1, A, 1.7e308), span(0, 1, B, 1.7e308)], 1) == (2 * defaults.MAX_THROUGHPUT,)


SWARMS = st.integers(2, 10).flatmap(
    lambda total: st.tuples(
        st.just(total),
        st.lists(
            st.lists(
                st.tuples(
                    st.integers(0, total - 1),
                    st.integers(1, total),
                    st.integers(1, 6),
                    st.sampled_from([0.0, 1.0, 1.5, 100.0, 1e300]),
                    st.sampled_from(["ONLINE", "JOINING", "OFFLINE"]),
                ),
                max_size=6,
            ),
            min_size=1,
            max_size=2,
        ),
        st.integers(0, total - 1),
        st.integers(1, total),
        st.floats(0, 1),
    )
)


@settings(deadline=None)
@given(SWARMS)
def test_whoever_is_told_to_move_leaves_nobody_alone_and_finds_a_place_in_the_model(swarm: Any) -> None:
    total, described, start, size, quality = swarm
    networks = [
        [span(s, min(total, s + n), peer(p), throughput, state) for s, n, p, throughput, state in network]
        for network in described
    ]
    own = span(start, min(total, start + size), ME, 2.0)
    advice = advised(*networks, own=own, total=total, quality=quality, most_moves=500)
    assert len(advice.blocks) == len(own.blocks)
    assert 0 <= advice.blocks.start < advice.blocks.stop <= total
    assert advice.reason
    if advice.blocks != own.blocks:
        without = summed([throughputs(network, total) for network in networks], total)
        covered = min(summed([without, throughputs([own], total)], total)) > 0.01
        assert not covered or min(without) > 0
