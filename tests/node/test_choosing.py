"""The blocks that a node chooses for itself, from what each of its networks tells."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from node_support import NOWHERE, TINY, node_config, running_node
from structlog.testing import capture_logs

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import ModelOutline
from kwaainet_bridge.errors import ConfigError, NetworkError, RemoteError
from kwaainet_bridge.hivemind.client import Span
from kwaainet_bridge.hivemind.client.block_choice import Advice
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.node.choosing import choose_blocks, reconsider_blocks
from kwaainet_bridge.wire.peer_id import PeerId

A, B = (PeerId(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2))
CONFIG = ModelConfig(blocks="auto", num_blocks=2)
MODEL = ModelOutline("llama", 8)


class Network:
    """One that answers after ``seconds`` with ``spans``, or raises what it is given."""

    def __init__(
        self, name: str, *spans: Span, seconds: float = 0, error: Callable[[], Exception] | None = None
    ) -> None:
        self.name = name
        self._spans = spans
        self._seconds = seconds
        self._error = error

    async def spans(self, config: ModelConfig, model: ModelOutline) -> list[Span]:
        assert (config, model) == (CONFIG, MODEL)
        await trio.sleep(self._seconds)
        if self._error is not None:
            raise self._error()
        return list(self._spans)


def span(start: int, end: int, throughput: float = 1.0, peer: PeerId = A, state: str = "ONLINE") -> Span:
    return Span(peer, range(start, end), ServerInfo(ServerState[state], throughput))


async def chosen(*networks: Network, num_blocks: int = 2) -> tuple[range, list[Any]]:
    with capture_logs() as logs:
        blocks = await choose_blocks(CONFIG, networks, MODEL, num_blocks)
    return blocks, logs


async def test_the_gap_of_both_networks_is_filled_and_the_log_tells_why() -> None:
    blocks, logs = await chosen(Network("petals", span(0, 4)), Network("kwaainet", span(6, 8, peer=B)))
    assert blocks == range(4, 6)
    assert logs == [
        {
            "event": "blocks chosen",
            "log_level": "info",
            "blocks": "4:6",
            "model_blocks": 8,
            "networks": ["kwaainet", "petals"],
            "reason": "nobody serves 4:6",
        }
    ]


async def test_one_network_and_none() -> None:
    assert (await chosen(Network("petals", span(0, 4))))[0] == range(4, 6)
    assert (await chosen(Network("kwaainet", span(2, 8))))[0] == range(2)
    assert (await chosen())[0] == range(2)


async def test_a_model_with_fewer_blocks_is_chosen_whole() -> None:
    blocks, logs = await chosen(Network("petals", span(0, 8)), num_blocks=100)
    assert blocks == range(8)
    assert logs[-1]["reason"] == "it is the whole model"


async def test_blocks_that_others_are_about_to_serve_are_left_to_them() -> None:
    joining = span(4, 6, 0.0, B, "JOINING")
    blocks, _ = await chosen(Network("petals", span(0, 4)), Network("kwaainet", joining))
    assert blocks == range(6, 8)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Network("kwaainet", error=lambda: NetworkError("nobody is there")), "nobody is there"),
        (Network("kwaainet", error=lambda: RemoteError("nonsense")), "nonsense"),
        (Network("kwaainet", span(4, 6), seconds=defaults.DIRECTORY_READ_SECONDS + 1), "no answer"),
    ],
    ids=["network", "remote", "silent"],
)
async def test_a_network_that_cannot_be_read_counts_as_empty(
    broken: Network, why: str, autojump_clock: trio.testing.MockClock
) -> None:
    blocks, (warning, told) = await chosen(Network("petals", span(0, 4)), broken)
    assert blocks == range(4, 6)
    assert told["networks"] == ["petals"]
    assert warning == {
        "event": "blocks are chosen without a network",
        "log_level": "warning",
        "network": "kwaainet",
        "reason": why,
    }


async def test_networks_are_read_at_once_and_their_order_of_answers_does_not_matter(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.current_time()
    for delays in ((50, 40, 30), (30, 40, 50)):
        networks = [
            # the sum is above 0.6 in this order, and 0.6 in the other
            Network("first", span(0, 6, 0.1), span(6, 8, 0.6, B), seconds=delays[0]),
            Network("second", span(0, 6, 0.2), seconds=delays[1]),
            Network("third", span(0, 6, 0.3), seconds=delays[2]),
        ]
        assert (await chosen(*networks))[0] == range(6, 8)
    assert trio.current_time() - began == pytest.approx(100)


async def test_a_name_that_blocks_cannot_have_ends_the_start() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="no such name")):
        await chosen(Network("petals", error=lambda: ConfigError("no such name")))


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


async def reconsidered(*networks: Network) -> tuple[Advice | None, list[Any]]:
    with capture_logs() as logs:
        advice = await reconsider_blocks(CONFIG, networks, MODEL, span(0, 2, peer=B), rng=random.Random(1))
    return advice, logs


@pytest.mark.parametrize(
    "servers", [1, defaults.REBALANCE_SERVERS_ON_LOOP + 1], ids=["on the loop", "in a thread"]
)
async def test_the_blocks_that_a_node_has_are_judged_by_both_networks(servers: int) -> None:
    same = [span(0, 2, peer=peer(number)) for number in range(servers)]
    advice, logs = await reconsidered(Network("petals", *same), Network("kwaainet", span(2, 6)))
    assert advice is not None
    assert advice.blocks == range(6, 8)
    assert logs == []
    advice, _ = await reconsidered(Network("petals", *same), Network("kwaainet", span(2, 8, 20.0)))
    assert advice is not None
    assert advice.blocks == range(2)


async def test_nobody_can_judge_while_a_network_cannot_be_read() -> None:
    silent = Network("kwaainet", error=lambda: NetworkError("nobody is there"))
    advice, (told,) = await reconsidered(Network("petals", span(0, 2)), silent)
    assert advice is None
    assert told["reason"] == {"kwaainet": "nobody is there"}


@pytest.mark.slow
async def test_a_node_none_of_whose_bootstrap_peers_is_reached_chooses_and_says_so(tmp_path: Path) -> None:
    served = {"name": str(TINY), "blocks": "auto", "num_blocks": 3, "throughput": 1.0, "threads": 1}
    config = node_config(tmp_path, "alone", bootstrap=[NOWHERE], model=served)
    with capture_logs() as logs:
        async with running_node(config) as node:
            await node.serving()
            await node.drained()
    warning = next(entry for entry in logs if entry["event"] == "blocks are chosen without a network")
    assert warning["network"] == "petals"
    assert warning["reason"] == "none of 1 bootstrap peers is reached"
    told = next(entry for entry in logs if entry["event"] == "blocks chosen")
    assert (told["blocks"], told["networks"]) == ("0:3", [])
