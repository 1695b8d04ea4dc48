"""``swarm``: the picture of a network, its JSON, and the models that are asked for."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console
from typer.testing import CliRunner

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.shared_models import SharedModel
from kwaainet_bridge.cli import swarm, visit
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.swarm import NetworkSurvey, shared_as_json, show_swarm
from kwaainet_bridge.cli.swarm_models import Wanted
from kwaainet_bridge.cli.swarm_picture import draw_bar, gaps_in_words, print_network
from kwaainet_bridge.config import parse_config
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.client import Check, Coverage, Span, SurveyedModel, SwarmModel
from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.hivemind.experts.records import (
    MODEL_REGISTRY_KEY,
    ServerInfo,
    ServerState,
    block_uid,
)
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
DOCUMENTED = PAGE[PAGE.index("## swarm\n") : PAGE.index("## dht get\n")]

HOSTILE = "\x1b[2J\x07\u202e[bold red]x[/]\n[/nothing]"
A, B, C = (PeerId(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2, 3))
MODEL = SwarmModel("some-model-hf", 8, "https://huggingface.co/some/model")


def span(peer: PeerId, start: int, end: int, state: ServerState = ServerState.ONLINE, **fields: Any) -> Span:
    return Span(peer, range(start, end), ServerInfo(state, 12.5, start_block=start, end_block=end, **fields))


SPANS = (
    span(A, 0, 4, public_name="attic", version="2.3.0", using_relay=False, adapters=("x", "y")),
    span(B, 2, 4, using_relay=True, cache_tokens_left=4096),
    span(C, 4, 8, ServerState.JOINING),
)
CHECKS = {
    A: Check(True, 0.0405),
    B: Check(False, error="cannot reach B (tcp): refused"),
    C: Check(True, relayed=True),
}


def terminal(width: int = 200, *, coloured: bool = False, **options: Any) -> Console:
    out = io.TextIOWrapper(io.BytesIO(), encoding=options.pop("encoding", "utf-8"))
    return Console(
        file=out, width=width, force_terminal=coloured, highlight=False, markup=False, emoji=False,
        color_system="standard" if coloured else None, **options,
    )  # fmt: skip


def printed(out: Console) -> str:
    out.file.seek(0)
    return out.file.read()


def picture(*models: SurveyedModel, checks: Any = None, out: Console | None = None, **options: Any) -> str:
    out = out or terminal()
    print_network(out, "petals", models, checks, **options)
    return printed(out)


# --- the picture


def test_a_network() -> None:
    lines = picture(SurveyedModel(MODEL, SPANS), checks=CHECKS).splitlines()
    assert lines[:5] == [
        "petals: 1 model",
        "",
        "some-model-hf  8 blocks, https://huggingface.co/some/model",
        "0 11##.... 8",
        "no server is online for blocks 4:8",
    ]
    assert re.split(r"  +", lines[5].strip()) == [
        "peer", "name", "blocks", "state", "rate", "version", "relay", "connected", "adapters",
        "cache",
    ]  # fmt: skip
    assert re.split(r"  +", lines[6].strip()) == [
        str(A), "attic", "0:4", "online", "12.5", "2.3.0", "no", "40.5 ms", "x, y",
    ]  # fmt: skip
    assert re.split(r"  +", lines[7].strip()) == [str(B), "2:4", "online", "12.5", "yes", "no", "4096"]
    assert re.split(r"  +", lines[8].strip()) == [str(C), "4:8", "JOINING", "12.5", "yes by relay"]
    assert lines[9:] == ["not connected: cannot reach B (tcp): refused"]


def test_without_checks() -> None:
    text = picture(SurveyedModel(MODEL, SPANS))
    assert text.count("not checked") == 3
    assert "not connected" not in text
    assert picture(SurveyedModel(MODEL, SPANS), checks={A: CHECKS[A]}).count("not checked") == 2


def test_several_models_and_those_left_out() -> None:
    text = picture(SurveyedModel(MODEL), SurveyedModel(SwarmModel("other", 1), error="no answer"), left_out=3)
    lines = text.splitlines()
    assert lines[:2] == ["petals: 2 models", "3 more are registered: see one with --model"]
    assert "no server is online" in lines
    assert lines[-2:] == ["other  1 block", "its records could not be read: no answer"]


def test_no_model() -> None:
    assert picture() == "petals: 0 models\n"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 2), "every block is served"),
        ((0, 0), "no server is online"),
        ((0, 1, 0, 0), "no server is online for blocks 0:1, 2:4"),
    ],
)
def test_gaps_in_words(counts: tuple[int, ...], words: str) -> None:
    assert gaps_in_words(Coverage(counts)) == words


def test_colours() -> None:
    size, bar = draw_bar(Coverage((0, 1, 2, 9)), terminal(coloured=True))
    assert size == 1
    assert bar.plain == "░███"
    assert [str(part.style) for part in bar.spans] == ["red", "yellow", "green", "green"]


@pytest.mark.parametrize(
    "out",
    [terminal(), terminal(coloured=True, no_color=True), terminal(coloured=True, encoding="ascii")],
    ids=["no terminal", "NO_COLOR", "ASCII only"],
)
def test_plain_characters(out: Console) -> None:
    _, bar = draw_bar(Coverage((0, 1, 2, 9)), out)
    assert bar.plain == ".1##"
    assert not bar.spans


@pytest.mark.parametrize("width", [10, 40, 80, 300])
def test_long_models_fit(width: int) -> None:
    counts = tuple(int(block != 500) for block in range(1000))
    out = terminal(width)
    size, bar = draw_bar(Coverage(counts), out)
    assert len(bar) <= width
    assert len(bar) == -(-1000 // size)
    assert bar.plain.count(".") == 1
    model = SurveyedModel(SwarmModel("m", 1000), (span(A, 0, 1000),))
    text = picture(model, out=terminal(width)).replace("\n", " ")
    assert f"a cell is {size} blocks, drawn as the worst of them" in re.sub(r"\s+", " ", text)


def test_a_table_fits_on_a_terminal_of_80_columns() -> None:
    text = picture(SurveyedModel(MODEL, SPANS), checks=CHECKS, out=terminal(80))
    lines = text.splitlines()
    for word in ("connected", "JOINING", "40.5 ms", "4096", A.short):
        assert any(word in line for line in lines[5:])
    assert max(map(len, lines)) <= 80


def test_a_column_without_text_is_left_out() -> None:
    header = picture(SurveyedModel(MODEL, (span(A, 0, 8),))).splitlines()[5]
    assert header.split() == ["peer", "blocks", "state", "rate", "connected"]


def test_narrow_terminals_show_short_ids() -> None:
    text = picture(SurveyedModel(MODEL, SPANS), checks=CHECKS, out=terminal(120, coloured=True))
    assert A.short in text
    assert str(A) not in text


@pytest.mark.parametrize("coloured", [True, False])
def test_hostile_names_reach_the_terminal_as_text(coloured: bool) -> None:
    model = SwarmModel(HOSTILE.replace(".", ""), 8, HOSTILE * 50)
    servers = (
        span(A, 0, 8, public_name=HOSTILE, version=HOSTILE, adapters=(HOSTILE,) * 1000),
        span(B, 0, 8, public_name="x" * 10**6),
    )
    checks = {A: Check(False, error=HOSTILE * 100)}
    plain = picture(SurveyedModel(model, servers), checks=checks, out=terminal(400, coloured=coloured))
    plain = re.sub(r"\x1b\[[\d;]*m", "", plain)  # our own colours
    assert all(line.isprintable() for line in plain.splitlines())
    assert "[bold red]x[/]" in plain  # inert
    assert len(plain) < 10_000


# --- JSON


def test_json() -> None:
    survey = NetworkSurvey("petals", (SurveyedModel(MODEL, SPANS),), CHECKS, 2)
    told = json.loads(json.dumps(survey.as_json(), allow_nan=False))
    assert told.keys() == {"network", "models", "models_left_out", "error"}
    assert told["models_left_out"] == 2
    (model,) = told["models"]
    servers = model.pop("servers")
    assert model == {
        "prefix": "some-model-hf",
        "repository": "https://huggingface.co/some/model",
        "num_blocks": 8,
        "servers_per_block": [1, 1, 2, 2, 0, 0, 0, 0],
        "gaps": [[4, 8]],
        "error": "",
    }
    assert servers[0] == {
        "peer": str(A),
        "public_name": "attic",
        "blocks": [0, 4],
        "state": "online",
        "throughput": 12.5,
        "inference_rps": None,
        "forward_rps": None,
        "network_rps": None,
        "version": "2.3.0",
        "torch_dtype": None,
        "quant_type": None,
        "using_relay": False,
        "adapters": ["x", "y"],
        "cache_tokens_left": None,
        "left_out": "",
        "check": {"reachable": True, "round_trip_ms": 40.5, "relayed": False, "error": ""},
    }
    assert [server["state"] for server in servers] == ["online", "online", "joining"]
    assert servers[1]["check"]["reachable"] is False
    assert servers[2]["check"]["round_trip_ms"] is None
    assert servers[2]["check"]["relayed"] is True
    for keys in (told, model, servers[0], servers[0]["check"]):
        assert all(f"`{key}`" in DOCUMENTED for key in keys)
    shared = shared_as_json(SharedModel({"petals": SurveyedModel(MODEL, SPANS)}), 2)
    assert all(f"`{key}`" in DOCUMENTED for key in (*shared, *shared["suggestion"]))
    unchecked = NetworkSurvey("petals", (SurveyedModel(MODEL, SPANS),)).as_json()
    assert unchecked["models"][0]["servers"][0]["check"] is None


# --- a swarm of this process


@pytest.fixture(autouse=True)
def _leave_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "configure_logging", lambda *_: None)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with open_host(HostConfig(Identity.generate("ed25519"))) as host:
        yield host


@pytest.fixture
async def node(host: Host) -> AsyncIterator[DhtNode]:
    async with DhtNode(host, RpcServer(host), RpcClient(host)).running() as node:
        yield node


def config_of(*addresses: str) -> Any:
    return parse_config("", "test", {"networks": {"petals": {"bootstrap": list(addresses)}}})


@pytest.fixture
def config(host: Host) -> Any:
    return config_of(host.addresses()[0])


async def announce(node: DhtNode, prefix: str, *spans: Span, registered: Any = None) -> None:
    until = time.time() + 60
    items = [
        Item(block_uid(prefix, block), each.info.to_value(), until, str(each.peer))
        for each in spans
        for block in each.blocks
    ]
    if registered is not None:
        items.append(Item(MODEL_REGISTRY_KEY, registered, until, prefix))
    assert all(result.ok for result in await node.store_many(items))


async def shown(config: Any, capsys: pytest.CaptureFixture[str], **wanted: Any) -> Any:
    check = wanted.pop("check", False)
    await show_swarm(config, Wanted(**wanted), check=check, as_json=True)
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["network"] == "petals"
    return network


async def test_a_swarm(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = span(node.peer_id, 0, 4, public_name=HOSTILE)
    await announce(node, "a-hf", own, *SPANS[1:], registered={"num_blocks": 8, "repository": None})
    network = await shown(config, capsys, check=True)
    (model,) = network["models"]
    assert (model["prefix"], model["servers_per_block"]) == ("a-hf", [1, 1, 2, 2, 0, 0, 0, 0])
    assert [server["state"] for server in model["servers"]] == ["online", "online", "joining"]
    first, gone, _ = model["servers"]
    assert (first["peer"], first["public_name"]) == (str(node.peer_id), HOSTILE)
    assert first["check"]["reachable"] is True
    assert 0 < first["check"]["round_trip_ms"] < 1000
    assert gone["check"]["reachable"] is False
    assert str(B) in gone["check"]["error"]

    await show_swarm(config, Wanted(), check=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "0 11##.... 8"
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("not connected: ") for line in lines) == 2


async def test_malformed_records(
    node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    await announce(node, "a-hf", span(A, 0, 2), registered={"num_blocks": 2, "repository": None})
    await announce(node, "evil", registered={"num_blocks": 10**12, "repository": None})
    until = time.time() + 60
    bad: list[tuple[Any, Any]] = [
        (str(B), (2, float("nan"), {})),
        (str(B)[:-1] + "!", (2, 1.0, {})),
        (HOSTILE, (2, 1.0, {})),
        (str(C), (2, 1.0, {"start_block": 5, "end_block": 1})),
        (7, "nonsense"),
    ]
    for subkey, value in bad:
        assert (await node.store("a-hf.1", value, until, subkey=subkey)).ok
    network = await shown(config, capsys)
    assert [model["prefix"] for model in network["models"]] == ["a-hf"]
    assert [server["peer"] for server in network["models"][0]["servers"]] == [str(A)]
    assert network["models"][0]["gaps"] == []
    assert f"skipped {len(bad)} bad server records" in caplog.text
    assert "skipped 1 bad model records" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)


async def test_models_by_name(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = "https://huggingface.co/owner/Beluga"
    await announce(node, "beluga-hf", span(A, 0, 2), registered={"num_blocks": 2, "repository": page})
    await announce(node, "other", registered={"num_blocks": 3, "repository": None})
    await announce(node, "_private", span(B, 0, 1))
    assert len((await shown(config, capsys))["models"]) == 2
    for wanted in (
        {"model": "owner/Beluga"},
        {"model": "beluga-hf"},
        {"model": page},
        {"prefix": "beluga-hf"},
    ):
        network = await shown(config, capsys, **wanted)
        assert [model["prefix"] for model in network["models"]] == ["beluga-hf"]
    private = await shown(config, capsys, prefix="_private", num_blocks=2)
    assert private["models"][0]["servers_per_block"] == [1, 0]
    with pytest.raises(NetworkError, match=r"nope is not registered.*beluga-hf, other"):
        await shown(config, capsys, model="nope")
    with pytest.raises(NetworkError, match=r"_private is not registered.*--blocks-total"):
        await shown(config, capsys, prefix="_private")


async def test_an_empty_swarm(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert (await shown(config, capsys, check=True))["models"] == []


async def test_a_crowded_registry(
    node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MAX_SURVEYED_MODELS", 3)
    for number in range(5):
        await announce(node, f"m{number}", registered={"num_blocks": 1, "repository": None})
    network = await shown(config, capsys)
    assert [model["prefix"] for model in network["models"]] == ["m0", "m1", "m2"]
    assert network["models_left_out"] == 2
    assert (await shown(config, capsys, model="m4"))["models"][0]["prefix"] == "m4"


async def test_no_bootstrap_peer_is_reached() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{s.getsockname()[1]}/p2p/{A}"
    with pytest.raises(NetworkError, match="the swarm cannot be reached") as failed:
        await show_swarm(config_of(address), Wanted(), check=True, as_json=True)
    assert f"{address}: cannot reach {A} (tcp)" in str(failed.value)
    with pytest.raises(ConfigError, match="--initial-peers"):
        await show_swarm(config_of(), Wanted(), check=True, as_json=True)


# --- the command line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": "a", "prefix": "b"}, "exclude each other"),
        ({"num_blocks": 8}, "give its --prefix"),
        ({"num_blocks": 8, "model": "a"}, "give its --prefix"),
        ({"prefix": "a.b"}, "without dots"),
    ],
)
def test_options_that_contradict(options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Wanted(**options)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    async def show(config: Any, wanted: Wanted, **options: Any) -> None:
        await trio.lowlevel.checkpoint()
        calls.append((config.networks.petals.bootstrap, wanted, options))

    monkeypatch.setattr(swarm, "show_swarm", show)
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{A}"
    for line in ("swarm", "swarm --model m --no-check --json", "swarm --prefix p --blocks-total 9"):
        done = CliRunner().invoke(app, [*line.split(), "--initial-peers", address])
        assert done.exit_code == 0, done.output
    assert calls == [
        ((address,), Wanted(), {"check": True, "as_json": False, "num_blocks": None}),
        ((address,), Wanted("m"), {"check": False, "as_json": True, "num_blocks": None}),
        ((address,), Wanted(None, "p", 9), {"check": True, "as_json": False, "num_blocks": None}),
    ]
    too_many = str(defaults.MAX_MODEL_BLOCKS + 1)
    assert CliRunner().invoke(app, ["swarm", "--prefix", "p", "--blocks-total", too_many]).exit_code == 2
