from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from client_fakes import peer

from kwaainet_bridge.errors import NoRoute
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.client.routing import (
    Bans,
    Hop,
    block_list,
    fastest_chain,
    random_chain,
    retry_delay,
)
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C, D = map(peer, range(1, 5))


def span(
    who: PeerId, start: int, end: int, *, rps: float | None = 100.0, left: int | None = None, throughput=1.0
) -> Span:
    info = ServerInfo(ServerState.ONLINE, throughput, inference_rps=rps, cache_tokens_left=left)
    return Span(who, range(start, end), info)


def fastest(spans: list[Span], start: int, end: int, rtts=None, cache_tokens: int = 0) -> list[Hop]:
    return fastest_chain(
        spans, range(start, end), model="m", rtts=dict(rtts or {}), cache_tokens=cache_tokens
    )


def hops(*parts: tuple[PeerId, int, int]) -> list[Hop]:
    return [Hop(who, range(start, end)) for who, start, end in parts]


def test_one_server_for_all_beats_two_for_half() -> None:
    spans = [span(A, 0, 4), span(B, 4, 8), span(C, 0, 8)]
    assert fastest(spans, 0, 8) == hops((C, 0, 8))


def test_halves_form_a_chain() -> None:
    assert fastest([span(B, 4, 8), span(A, 0, 4)], 0, 8) == hops((A, 0, 4), (B, 4, 8))


def test_the_nearer_of_two_is_chosen() -> None:
    spans = [span(A, 0, 8), span(B, 0, 8)]
    assert fastest(spans, 0, 8, {A: 0.2, B: 0.01}) == hops((B, 0, 8))


def test_a_server_that_does_not_answer_pings_is_a_last_resort() -> None:
    spans = [span(A, 0, 8), span(B, 0, 4), span(C, 4, 8)]
    assert fastest(spans, 0, 8, {A: math.inf}) == hops((B, 0, 4), (C, 4, 8))
    assert fastest(spans[:1], 0, 8, {A: math.inf}) == hops((A, 0, 8))


def test_a_faster_server_is_entered_as_soon_as_its_blocks_begin() -> None:
    spans = [span(A, 0, 8, rps=1.0), span(B, 2, 8, rps=1000.0)]
    assert fastest(spans, 0, 8) == hops((A, 0, 2), (B, 2, 8))


def test_a_slower_server_is_entered_as_late_as_possible() -> None:
    spans = [span(A, 0, 6, rps=1000.0), span(B, 2, 8, rps=1.0)]
    assert fastest(spans, 0, 8) == hops((A, 0, 6), (B, 6, 8))


def test_spans_are_entered_and_left_in_the_middle_of_the_request() -> None:
    assert fastest([span(A, 0, 5), span(B, 3, 9)], 2, 8) == hops((A, 2, 5), (B, 5, 8))


def test_a_full_cache_is_avoided_but_not_excluded() -> None:
    # 10 tokens in 4 blocks are 80, keys and values counted apart
    spans = [span(A, 0, 4, left=79), span(B, 0, 4, rps=1.0, left=80)]
    assert fastest(spans, 0, 4, cache_tokens=10) == hops((B, 0, 4))
    assert fastest(spans[:1], 0, 4, cache_tokens=10) == hops((A, 0, 4))
    assert fastest(spans, 0, 4, cache_tokens=9) == hops((A, 0, 4))


def test_missing_blocks_are_named() -> None:
    spans = [span(A, 0, 3), span(B, 5, 6)]
    with pytest.raises(NoRoute, match=r"m: no server is online for blocks 3:5, 6:8; start one") as caught:
        fastest(spans, 0, 8)
    assert caught.value.blocks == (3, 4, 6, 7)
    with pytest.raises(NoRoute, match="blocks 0:8"):
        random_chain([], range(8), model="m", rtts={}, rng=random.Random(0))


def _cost(chain: list[Hop], spans: list[Span], rtts: dict[PeerId, float]) -> float:
    rps = {s.peer: s.info.inference_rps or 300.0 for s in spans}
    return sum(rtts[h.peer] + 0.018 + len(h.blocks) / rps[h.peer] for h in chain)


def _all_chains(spans: list[Span], start: int, end: int) -> list[list[Hop]]:
    if start == end:
        return [[]]
    chains = []
    for s in spans:
        if start in s.blocks:
            for stop in range(start + 1, min(s.blocks.stop, end) + 1):
                rest = _all_chains(spans, stop, end)
                chains += [[Hop(s.peer, range(start, stop)), *chain] for chain in rest]
    return chains


@pytest.mark.parametrize("seed", range(30))
def test_no_chain_at_all_is_faster(seed: int) -> None:
    rng = random.Random(seed)
    spans, rtts = [], {}
    for number in range(4):
        start = rng.randrange(5)
        who = peer(number)
        spans.append(span(who, start, rng.randrange(start + 1, 7), rps=rng.choice([1, 5, 30, 200])))
        rtts[who] = rng.choice([0.001, 0.05, 0.3])
    spans.append(span(peer(9), 0, 6, rps=2))
    rtts[peer(9)] = 0.2
    best = min(_cost(chain, spans, rtts) for chain in _all_chains(spans, 0, 6))
    chain = fastest(spans, 0, 6, rtts)
    assert _cost(chain, spans, rtts) == pytest.approx(best)
    assert [b for hop in chain for b in hop.blocks] == list(range(6))


def test_a_swarm_of_hundreds_is_routed_in_no_time() -> None:
    rng = random.Random(0)
    spans = []
    for number in range(400):
        start = rng.randrange(75)
        spans.append(
            span(peer(number), start, min(80, start + rng.randrange(2, 20)), rps=rng.uniform(10, 500))
        )
    chain = fastest(spans, 0, 80)
    assert [b for hop in chain for b in hop.blocks] == list(range(80))


def test_random_chains_follow_throughput_and_length() -> None:
    spans = [span(A, 0, 4, throughput=3.0), span(B, 0, 4, throughput=1.0), span(C, 4, 8)]
    rng = random.Random(0)
    first = Counter(random_chain(spans, range(8), model="m", rtts={}, rng=rng)[0].peer for _ in range(2000))
    assert first[A] / 2000 == pytest.approx(0.75, abs=0.04)
    spans = [span(A, 0, 6), span(B, 0, 2), span(C, 0, 8)]
    first = Counter(random_chain(spans, range(6), model="m", rtts={}, rng=rng)[0].peer for _ in range(2000))
    assert first[B] / 2000 == pytest.approx(2 / 14, abs=0.04)


def test_random_chains_leave_out_the_silent_and_keep_the_modest() -> None:
    spans = [span(A, 0, 4, throughput=100.0), span(B, 0, 4, throughput=1.0), span(C, 4, 8, throughput=0.0)]
    for seed in range(50):
        chain = random_chain(spans, range(8), model="m", rtts={A: math.inf}, rng=random.Random(seed))
        assert chain == hops((B, 0, 4), (C, 4, 8))


def test_bans_double_and_are_lifted_by_success() -> None:
    bans = Bans(first=10.0, longest=35.0)
    bans.add(A, now=100.0)
    bans.add(A, now=101.0)  # the same trouble, seen by another call
    assert bans.includes(A, 109.9)
    assert not bans.includes(A, 110.0)
    assert not bans.includes(B, 105.0)
    for start, until in [(200.0, 220.0), (300.0, 335.0), (400.0, 435.0)]:
        bans.add(A, now=start)
        assert bans.includes(A, until - 0.1)
        assert not bans.includes(A, until)
    bans.lift(A)
    bans.add(A, now=500.0)
    assert not bans.includes(A, 510.0)


def test_pauses_grow_to_a_limit() -> None:
    assert [retry_delay(n) for n in range(1, 10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert retry_delay(10**9) == 60


def test_blocks_are_listed_as_ranges() -> None:
    assert block_list([0, 1, 2, 5, 7, 8]) == "0:3, 5:6, 7:9"
