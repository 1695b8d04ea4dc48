"""``swarm`` over two networks: the picture, its JSON, which models are looked at, and a network that is not there."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from rich.console import Console
from typer.testing import CliRunner

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.shared_models import SharedModel
from kwaainet_bridge.cli import run, swarm, visit
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.swarm import show_swarm
from kwaainet_bridge.cli.swarm_models import FoundModels, Wanted, find_models
from kwaainet_bridge.cli.swarm_picture import print_header, print_shared
from kwaainet_bridge.config import NodeConfig, parse_config
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.client import Check, Span, SurveyedModel, SwarmModel
from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.hivemind.experts.records import (
    MODEL_REGISTRY_KEY,
    ServerInfo,
    ServerState,
    block_uid,
)
from kwaainet_bridge.kwaai.records import JOINING, READY, NodeInfo
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C = (PeerId(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2, 3))
NOWHERE = f"/ip4/127.0.0.1/tcp/1/p2p/{A}"
HOSTILE = "\x1b[2J\x07\u202e[bold red]x[/]\n"


def span(peer: PeerId, start: int, end: int, **fields: Any) -> Span:
    return Span(peer, range(start, end), ServerInfo(ServerState.ONLINE, 12.5, **fields))


PETALS = SurveyedModel(SwarmModel("m-hf", 8), (span(A, 0, 4, public_name="attic"),))
KWAAINET = SurveyedModel(
    SwarmModel("m", 8, "owner/m"),
    (span(A, 0, 4), span(B, 2, 5), span(C, 5, 8)),
    left_out={C: "it is too old"},
)
CHECKS = {A: Check(True, 0.0405), B: Check(False, error="cannot reach B (tcp): refused"), C: Check(True)}


# --- the picture


def drawn(model: SharedModel, advice: str = "", *, checks: Any = None, width: int = 200) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    print_shared(console, model, checks, advice)
    return out.getvalue().splitlines()


def test_a_model_of_both() -> None:
    lines = drawn(SharedModel({"petals": PETALS, "kwaainet": KWAAINET}), "some advice", checks=CHECKS)
    assert lines[:7] == [
        "m-hf (petals), m (kwaainet)  8 blocks, owner/m",
        "petals   0 1111.... 8",
        "kwaainet 0 11##1... 8",
        "petals: no server is online for blocks 4:8",
        "kwaainet: no server is online for blocks 5:8",
        "together: neither has 5:8; one has 4:5; both have 0:4",
        "some advice",
    ]
    assert lines[7].split()[:2] == ["network", "peer"]
    assert [line.split()[0] for line in lines[8:12]] == ["petals", "kwaainet", "kwaainet", "kwaainet"]
    assert lines[12:] == [
        f"left out by readers of kwaainet: {C.short}, it is too old",
        "not connected: cannot reach B (tcp): refused",
    ]


def test_a_model_that_could_not_be_read_in_one() -> None:
    unread = SurveyedModel(SwarmModel("m", 8), error=f"no answer {HOSTILE}")
    lines = drawn(SharedModel({"petals": PETALS, "kwaainet": unread}))
    assert lines[1] == "petals   0 1111.... 8"
    assert lines[2].startswith("kwaainet its records could not be read: no answer ")
    assert not any(line.startswith(("together", "kwaainet:")) for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("width", [40, 80])
def test_both_bars_of_a_long_model_have_the_same_scale(width: int) -> None:
    long = {name: SurveyedModel(SwarmModel("m", 300), (span(A, 0, 299),)) for name in ("petals", "kwaainet")}
    lines = drawn(SharedModel(long), width=width)
    bars = [line for line in lines if line.endswith(" 300")]
    assert len(bars) == 2
    assert len({len(bar) for bar in bars}) == 1
    assert all(len(bar) <= width and bar.count(".") == 1 for bar in bars)


def test_the_head_of_a_network_that_is_not_reached() -> None:
    out = io.StringIO()
    print_header(Console(file=out, width=100), "kwaainet", 0, error=f"nobody {HOSTILE}")
    assert out.getvalue().startswith("kwaainet: nobody ?[2J")


# --- which models


class Registry:
    """A DHT that holds nothing but registered models: their blocks and pages by prefix."""

    def __init__(self, **models: int | tuple[int, str]) -> None:
        self._models = models

    async def get_many(self, keys: Sequence[Any], *, latest: bool = True) -> Mapping[Any, Any]:
        assert (list(keys), latest) == ([MODEL_REGISTRY_KEY], True)
        await trio.lowlevel.checkpoint()
        return {MODEL_REGISTRY_KEY: self}

    @property
    def is_dictionary(self) -> bool:
        return True

    @property
    def value(self) -> Any:
        def told(model: int | tuple[int, str]) -> dict[str, Any]:
            blocks, page = model if isinstance(model, tuple) else (model, None)
            return {"num_blocks": blocks, "repository": page}

        return {prefix: (told(model), time.time() + 60) for prefix, model in self._models.items()}


def config_of(petals: Sequence[str] = (), kwaainet: Sequence[str] = (), **more: Any) -> NodeConfig:
    networks: dict[str, Any] = {"petals": {"bootstrap": list(petals)}}
    if kwaainet:
        networks["kwaainet"] = {"bootstrap": list(kwaainet)}
    return parse_config("", "test", {"networks": networks} | more)


def prefixes(found: FoundModels) -> dict[str, list[str]]:
    return {network: [model.prefix for model in models] for network, models in found.models.items()}


SOURCES = {
    "petals": Registry(**{"a-hf": 8, "b-hf": 4}),
    "kwaainet": Registry(a=(8, "owner/a"), c=8),
}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), {"petals": ["a-hf", "b-hf"], "kwaainet": ["a", "c"]}),
        (Wanted("owner/a"), {"petals": ["a-hf"], "kwaainet": ["a"]}),
        (Wanted(prefix="a-hf"), {"petals": ["a-hf"], "kwaainet": ["a"]}),
        (Wanted("b-hf"), {"petals": ["b-hf"], "kwaainet": []}),
        (Wanted(prefix="c"), {"petals": [], "kwaainet": ["c"]}),
        (Wanted(prefix="x-hf", num_blocks=3), {"petals": ["x-hf"], "kwaainet": ["x"]}),
    ],
)
async def test_a_model_is_found_by_any_of_its_names(wanted: Wanted, expected: Any) -> None:
    assert prefixes(await find_models(SOURCES, wanted, config_of(["petals-public"]))) == expected


async def test_a_model_that_is_registered_nowhere() -> None:
    with pytest.raises(NetworkError, match=r"nope is not registered.*a-hf, b-hf, a, c\)"):
        await find_models(SOURCES, Wanted("nope"), config_of(["petals-public"]))


async def test_the_configured_model_has_the_names_of_the_configuration() -> None:
    sources = {"petals": Registry(**{"mine-hf": 8}), "kwaainet": Registry(yours=8)}
    model = {"name": "./nowhere/mine", "blocks": "0:4"}
    config = config_of(["petals-public"], ["kwaainet-public"], model=model)
    # it would be called mine there: yours is another
    assert prefixes(await find_models(sources, Wanted("mine-hf"), config)) == {
        "petals": ["mine-hf"],
        "kwaainet": [],
    }
    networks = {"petals": {}, "kwaainet": {"dht_prefix": "yours"}}
    config = parse_config("", "test", {"networks": networks, "model": model | {"dht_prefix": "mine-hf"}})
    found = await find_models(sources, Wanted("mine-hf"), config)
    assert found.known == {"petals": "mine-hf", "kwaainet": "yours"}
    assert prefixes(found) == {"petals": ["mine-hf"], "kwaainet": ["yours"]}
    unregistered = await find_models(sources, Wanted(prefix="mine-hf", num_blocks=5), config)
    assert prefixes(unregistered) == {"petals": ["mine-hf"], "kwaainet": ["yours"]}


async def test_of_a_crowd_models_are_left_out_in_both_networks_or_in_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(defaults, "MAX_SURVEYED_MODELS", 2)
    sources = {
        "petals": Registry(**{"a-hf": 1, "b-hf": 1, "z-hf": 1}),
        "kwaainet": Registry(z=1, k=1, l=1, m=1),
    }
    found = await find_models(sources, Wanted(), config_of(["petals-public"]))
    assert prefixes(found) == {"petals": ["a-hf", "b-hf"], "kwaainet": ["k", "l"]}
    assert found.left_out == {"petals": 1, "kwaainet": 2}


# --- two networks in this process


@dataclass
class Both:
    """A DHT node of each network."""

    petals: DhtNode
    kwaainet: DhtNode
    addresses: dict[str, str]


@asynccontextmanager
async def dht_node() -> AsyncIterator[tuple[DhtNode, str]]:
    async with (
        open_host(HostConfig(Identity.generate("ed25519"))) as host,
        DhtNode(host, RpcServer(host), RpcClient(host)).running() as node,
    ):
        yield node, host.addresses()[0]


@pytest.fixture
async def both(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Both]:
    """In Petals A has 0:4 of m-hf; in KwaaiNet B has 4:6 of m, and C, which joins, 6:8."""
    monkeypatch.setattr(visit, "configure_logging", lambda *_: None)
    async with dht_node() as (petals, at), dht_node() as (kwaainet, there):
        until = time.time() + 60
        info = ServerInfo(ServerState.ONLINE, 1.0, start_block=0, end_block=4)
        items = [
            Item(MODEL_REGISTRY_KEY, {"num_blocks": 8, "repository": None}, until, "m-hf"),
            *(Item(block_uid("m-hf", block), info.to_value(), until, str(A)) for block in range(4)),
        ]
        assert all(result.ok for result in await petals.store_many(items))
        items = [Item(MODEL_REGISTRY_KEY, {"num_blocks": 8, "repository": ""}, until, "m")]
        for peer, state, blocks in ((B, READY, range(4, 6)), (C, JOINING, range(6, 8))):
            value = NodeInfo(peer, state, 2.0, blocks.start, blocks.stop).to_value()
            items += [Item(block_uid("m", block), value, until, str(peer)) for block in blocks]
        assert all(result.ok for result in await kwaainet.store_many(items))
        yield Both(petals, kwaainet, {"petals": at, "kwaainet": there})


async def told(config: NodeConfig, capsys: pytest.CaptureFixture[str], **options: Any) -> Any:
    await show_swarm(config, Wanted(), check=options.pop("check", False), as_json=True, **options)
    return json.loads(capsys.readouterr().out)


async def test_both_side_by_side(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of([both.addresses["petals"]], [both.addresses["kwaainet"]])
    seen = await told(config, capsys, num_blocks=3, check=True)
    petals, kwaainet = seen["networks"]
    assert (petals["network"], petals["models"][0]["gaps"]) == ("petals", [[4, 8]])
    assert (kwaainet["network"], kwaainet["models"][0]["gaps"]) == ("kwaainet", [[0, 4], [6, 8]])
    assert petals["error"] == kwaainet["error"] == ""
    ready, joining = kwaainet["models"][0]["servers"]
    assert (ready["peer"], ready["state"], ready["left_out"]) == (str(B), "online", "")
    assert (joining["peer"], joining["state"]) == (str(C), "joining")
    assert joining["left_out"] == "its state is 1: it joins, not 2 (ready)"
    assert ready["check"]["reachable"] is False
    assert seen["models"] == [
        {
            "prefixes": {"petals": "m-hf", "kwaainet": "m"},
            "num_blocks": 8,
            "unknown_in": [],
            "networks_per_block": [1, 1, 1, 1, 1, 1, 0, 0],
            "gaps": [[6, 8]],
            # C is about to fill the gap; what A has is weakest then
            "suggestion": {
                "blocks": [0, 3],
                "reason": "no other choice has a weaker block: 1 requests a second",
            },
        }
    ]
    await show_swarm(config, Wanted(), check=False, as_json=False, num_blocks=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["petals: 1 model", "kwaainet: 1 model", ""]
    assert "together: neither has 6:8; one has 0:6" in lines
    assert any(line.startswith("a node of 1 block would help most at 0:1 (") for line in lines)


@pytest.mark.parametrize("network", ["petals", "kwaainet"])
async def test_one_network_alone(both: Both, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(**{network: [both.addresses[network]]})
    seen = await told(config, capsys)
    assert [each["network"] for each in seen["networks"]] == [network]
    (model,) = seen["models"]
    assert list(model["prefixes"]) == [network]
    assert model["unknown_in"] == []
    await show_swarm(config, Wanted(), check=False, as_json=False)
    assert capsys.readouterr().out.startswith(f"{network}: 1 model\n\n")


@pytest.mark.parametrize(("lost", "there"), [("petals", "kwaainet"), ("kwaainet", "petals")])
async def test_a_network_that_is_not_reached_is_told_and_counted_by_nobody(
    both: Both, lost: str, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(**{lost: [NOWHERE], there: [both.addresses[there]]})
    await show_swarm(config, Wanted(), check=False, as_json=True)
    out, err = capsys.readouterr()
    seen = json.loads(out)
    networks = {network["network"]: network for network in seen["networks"]}
    assert networks[lost]["error"] == "none of its bootstrap peers is reached"
    assert networks[lost]["models"] == []
    assert networks[there]["error"] == ""
    (model,) = seen["models"]
    assert model["unknown_in"] == [lost]
    assert model["suggestion"]["reason"].endswith(f"; not known: {lost}")
    assert f"not reached: {NOWHERE}: cannot reach {A}" in err
    await show_swarm(config, Wanted(), check=False, as_json=False)
    text = capsys.readouterr().out
    assert f"{lost}: none of its bootstrap peers is reached\n" in text
    assert f"; not known: {lost})" in text


async def test_neither_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "configure_logging", lambda *_: None)
    with pytest.raises(NetworkError, match="the swarm cannot be reached") as failed:
        await show_swarm(config_of([NOWHERE], [NOWHERE]), Wanted(), check=False, as_json=True)
    assert str(failed.value).count(NOWHERE) == 2


# --- the command line


def test_both_networks_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    async def show(config: Any, wanted: Wanted, **options: Any) -> None:
        await trio.lowlevel.checkpoint()
        kwaainet = config.networks.kwaainet
        calls.append((config.networks.petals.bootstrap, kwaainet.bootstrap, options["num_blocks"]))

    monkeypatch.setattr(swarm, "show_swarm", show)
    line = ["swarm", "--kwaainet-peers", NOWHERE, "--num-blocks", "5"]
    for words in (line, [*line, "--initial-peers", NOWHERE]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert calls == [((), (NOWHERE,), 5), ((NOWHERE,), (NOWHERE,), 5)]


def test_a_node_is_told_to_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    configs: list[NodeConfig] = []

    async def start(config: NodeConfig, **_more: Any) -> None:
        await trio.lowlevel.checkpoint()
        configs.append(config)

    monkeypatch.setattr(run, "run_until_signalled", start)
    monkeypatch.setattr("gc.disable", lambda: None)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set first, so that they are taken away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    file = tmp_path / "node.yaml"
    file.write_text('model: {blocks: "0:4"}')
    choosing = tmp_path / "choosing.yaml"
    choosing.write_text("model: {blocks: auto, num_blocks: 3}")
    for words in (
        ["--auto", "--num-blocks", "2"],
        ["-c", str(file), "--auto", "--num-blocks", "2"],
        ["-c", str(choosing)],
        ["-c", str(choosing), "--num-blocks", "5"],
        ["-c", str(choosing), "--blocks", "1:2"],
    ):
        done = CliRunner().invoke(app, ["run", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert [config.model and config.model.blocks_to_choose for config in configs] == [2, 2, 3, 5, None]
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "3000")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--auto", "--blocks", "0:4"], "--auto and --blocks exclude each other"),
        (["--auto"], "give num_blocks (--num-blocks)"),
        (["--num-blocks", "2"], "give --auto, too"),
        (["--blocks", "0:4", "--num-blocks", "2"], "give --auto, too"),
    ],
)
def test_a_choice_that_is_not_said_clearly(words: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["run", *words])
    assert isinstance(done.exception, ConfigError)
    assert text in str(done.exception)
