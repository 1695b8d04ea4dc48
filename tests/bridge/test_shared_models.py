"""Models of several networks seen as one: which are the same, what is missing in all of them, where a node helps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.bridge.shared_models import SharedModel, is_same, shared_models
from kwaainet_bridge.hivemind.client import Span, SurveyedModel, SwarmModel
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C = (PeerId(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2, 3))
HUB = "https://huggingface.co/"


def span(peer: PeerId, start: int, end: int, throughput: float = 1.0, state: str = "ONLINE") -> Span:
    return Span(peer, range(start, end), ServerInfo(ServerState[state], throughput))


def surveyed(
    prefix: str, *spans: Span, blocks: int = 8, page: str | None = None, **more: Any
) -> SurveyedModel:
    return SurveyedModel(SwarmModel(prefix, blocks, page), spans, **more)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SwarmModel("Llama-2-7b-hf", 32), SwarmModel("Llama-2-7b", 32)),
        (SwarmModel("bloom-petals", 70), SwarmModel("Bloom", 70)),
        (SwarmModel("owner/StableBeluga2-hf", 80), SwarmModel("stablebeluga2", 80)),
        (SwarmModel("Meta-Llama-3-1-8B-hf", 32), SwarmModel("Llama-3-1-8B", 32)),
        (SwarmModel("one", 4, HUB + "Owner/Model"), SwarmModel("other", 4, "owner/model/")),
    ],
)
def test_the_same_model_under_two_names(first: SwarmModel, second: SwarmModel) -> None:
    assert is_same(first, second)
    assert is_same(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SwarmModel("a-hf", 8), SwarmModel("a", 9)),
        (SwarmModel("a-hf", 8), SwarmModel("b-hf", 8)),
        (SwarmModel("a", 8, HUB + "one/model"), SwarmModel("b", 8, HUB + "two/model")),
        (SwarmModel("a", 8, ""), SwarmModel("b", 8, "")),
        (SwarmModel("a", 8, "/"), SwarmModel("b", 8, "/")),
        (SwarmModel("meta-a", 8), SwarmModel("a", 8)),
    ],
)
def test_other_models(first: SwarmModel, second: SwarmModel) -> None:
    assert not is_same(first, second)
    assert not is_same(second, first)


def names(shared: list[SharedModel]) -> list[dict[str, str]]:
    return [{network: seen.model.prefix for network, seen in model.by_network.items()} for model in shared]


def test_models_of_both_networks_come_in_the_order_of_the_first() -> None:
    found = shared_models(
        {
            "petals": [surveyed("b-hf"), surveyed("a-hf"), surveyed("only-hf")],
            "kwaainet": [surveyed("a"), surveyed("alone"), surveyed("b"), surveyed("only", blocks=9)],
        }
    )
    assert names(found) == [
        {"petals": "b-hf", "kwaainet": "b"},
        {"petals": "a-hf", "kwaainet": "a"},
        {"petals": "only-hf"},
        {"kwaainet": "alone"},
        {"kwaainet": "only"},
    ]


def test_a_configuration_says_which_are_the_same() -> None:
    known = {"petals": "mine", "kwaainet": "yours"}
    networks = {
        "petals": [surveyed("mine"), surveyed("yours-hf")],
        "kwaainet": [surveyed("mine"), surveyed("yours")],
    }
    # the named two belong together, and to nobody else
    assert names(shared_models(networks, known=known)) == [
        {"petals": "mine", "kwaainet": "yours"},
        {"petals": "yours-hf"},
        {"kwaainet": "mine"},
    ]
    assert names(shared_models(networks)) == [
        {"petals": "mine", "kwaainet": "mine"},
        {"petals": "yours-hf", "kwaainet": "yours"},
    ]
    longer = {"petals": [surveyed("mine")], "kwaainet": [surveyed("yours", blocks=9)]}
    assert len(shared_models(longer, known=known)) == 2


PREFIXES = st.sampled_from(["a", "a-hf", "A", "b", "b-hf", "meta-llama-x", "llama-x", "o/a"])
MODELS = st.lists(st.builds(surveyed, PREFIXES, blocks=st.integers(1, 2)), max_size=6)


@given(st.dictionaries(st.sampled_from(["petals", "kwaainet", "third"]), MODELS))
def test_each_model_is_in_one_place(networks: dict[str, list[SurveyedModel]]) -> None:
    shared = shared_models(networks)
    for network, models in networks.items():
        placed = [model.by_network[network] for model in shared if network in model.by_network]
        assert sorted(map(id, placed)) == sorted(map(id, models))
    for model in shared:
        assert {seen.model.num_blocks for seen in model.by_network.values()} == {model.num_blocks}


def test_what_two_networks_have_together() -> None:
    model = SharedModel(
        {
            "petals": surveyed("m-hf", span(A, 0, 4)),
            "kwaainet": surveyed("m", span(A, 0, 2), span(B, 3, 6), span(C, 6, 8, state="JOINING")),
        }
    )
    assert model.unknown_in == ()
    assert model.networks_per_block == (2, 2, 1, 2, 1, 1, 0, 0)
    assert [model.held_in(number) for number in range(3)] == [
        [range(6, 8)],
        [range(2, 3), range(4, 6)],
        [range(2), range(3, 4)],
    ]
    # 6:8 has a server soon: what is weakest then is what one network has
    suggestion = model.suggestion(1)
    assert suggestion is not None
    assert suggestion.blocks == range(2, 3)


def test_servers_that_readers_leave_out_cover_nothing() -> None:
    model = SharedModel({"kwaainet": surveyed("m", span(A, 0, 8), span(B, 0, 2), left_out={A: "too old"})})
    assert model.held_in(0) == [range(2, 8)]
    suggestion = model.suggestion(6)
    assert suggestion is not None
    assert (suggestion.blocks, suggestion.reason) == (range(2, 8), "nobody serves 2:8")


@pytest.mark.parametrize(("fit", "blocks"), [(None, range(4, 7)), (1, range(4, 5)), (100, range(8))])
def test_how_many_blocks_fit(fit: int | None, blocks: range) -> None:
    suggestion = SharedModel({"petals": surveyed("m-hf", span(A, 0, 4))}).suggestion(fit)
    assert suggestion is not None
    assert suggestion.blocks == blocks


def test_what_is_not_known_is_told() -> None:
    unread = surveyed("m", error="no answer")
    seen = surveyed("m-hf", span(A, 0, 4))
    half = SharedModel({"petals": seen, "kwaainet": unread})
    lost = SharedModel({"petals": seen}, not_reached=["kwaainet"])
    for model in (half, lost):
        assert model.unknown_in == ("kwaainet",)
        assert model.networks_per_block == (1, 1, 1, 1, 0, 0, 0, 0)
        suggestion = model.suggestion(4)
        assert suggestion is not None
        assert suggestion.blocks == range(4, 8)
        assert suggestion.reason == "nobody serves 4:8; not known: kwaainet"
    nothing = SharedModel({"kwaainet": unread}, not_reached=["petals"])
    assert nothing.unknown_in == ("kwaainet", "petals")
    assert nothing.networks_per_block == (0,) * 8
    assert nothing.suggestion(4) is None
