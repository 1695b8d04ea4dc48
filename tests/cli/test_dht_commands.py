"""``dht get``, ``dht store`` and ``dht peers`` at nodes of this process, and how values are shown."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import msgpack
import pytest
import trio
from typer.testing import CliRunner

from kwaainet_bridge import defaults
from kwaainet_bridge.cli import dht, visit
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.dht import get_key, list_peers, parse_value, store_value
from kwaainet_bridge.cli.printing import as_text, expiry, expiry_text, jsonable, printable
from kwaainet_bridge.config import parse_config
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.msgpack import DictionaryValue, TensorDescriptor, pack

HOSTILE = "\x1b[2J\x1b]0;title\x07\u202e[red]\n\x9b5A"


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


def nowhere() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate('ed25519').peer_id}"


def in_a_minute() -> float:
    return time.time() + 60


# --- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("5.0", 5.0),
        ("1e3", 1000.0),
        ('"5"', "5"),
        ("five", "five"),
        ("", ""),
        ("true", True),
        ("null", None),
        ('[1, 2.0, {"a": []}]', [1, 2.0, {"a": []}]),
        ("[1, 2", "[1, 2"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[NaN]", "[NaN]"),
    ],
)
def test_a_value_is_json_or_else_text(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_floats_stay_floats_on_the_wire() -> None:
    assert pack(parse_value("[1.0, 1]")) == b"\x92\xcb\x3f\xf0" + bytes(6) + b"\x01"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (math.inf, "inf"),
        (math.nan, "nan"),
        ((2, 1.0, {"a": (1,)}), [2, 1.0, {"a": [1]}]),
        (b"text", {"bytes": "text"}),
        (b"\xff\x00", {"hex": "ff00"}),
        (b"\x1b[2J", {"hex": "1b5b324a"}),
        ({b"k": 1, b"\xff": 2}, {"k": 1, "ff": 2}),
        (msgpack.Timestamp(5), {"timestamp": 5.0}),
        (DictionaryValue(math.inf, 9.0, (("s", b"\xc0", 9.0),)), {"entries": [["s", {"hex": "c0"}, 9.0]]}),
    ],
)
def test_values_of_msgpack_as_json(value: Any, shown: Any) -> None:
    assert jsonable(value) == shown
    assert "NaN" not in json.dumps(jsonable(value), allow_nan=False)


def test_a_tensor_descriptor_as_json() -> None:
    shown = jsonable(TensorDescriptor(size=(None, 4), dtype="torch.float32"))
    assert shown["size"] == [None, 4]
    assert shown["dtype"] == "torch.float32"


@pytest.mark.parametrize("value", [HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE.encode()], (HOSTILE,)])
def test_what_peers_stored_stays_on_one_line(value: Any) -> None:
    assert as_text(value).isprintable()


def test_long_text_is_cut() -> None:
    assert printable("a" * 50, limit=10) == "a" * 9 + "…"
    assert printable("a" * 10, limit=10) == "a" * 10


@pytest.mark.parametrize("expiration", [math.inf, -math.inf, math.nan, 1e300])
def test_times_that_no_calendar_holds(expiration: float) -> None:
    expires = expiry(expiration, 0.0)
    assert expires["expires_at"] is None
    assert expiry_text(expires) == "never"
    json.dumps(expires, allow_nan=False)


def test_time_of_expiration() -> None:
    expires = expiry(1.7e9 + 60, 1.7e9)
    assert expires == {"expires_in": 60.0, "expires_at": "2023-11-14T22:14:20+00:00"}
    assert expiry_text(expires) == "in 60.0 s, 2023-11-14 22:14:20 UTC"


# --- get


async def test_get_a_plain_value(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await node.store("key", [1, 2.5, "three"], in_a_minute())
    for latest in (True, False):
        await get_key(config, "key", (), latest=latest, as_json=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["key        key", 'value      [1, 2.5, "three"]']
        assert re.fullmatch(r"expires    in (60\.0|5\d\.\d) s, \S+ \S+ UTC", lines[2])


async def test_get_json(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    until = in_a_minute()
    await node.store("key", (2, 0.5, b"\xff"), until)
    await get_key(config, "key", (), latest=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert 50 < told.pop("expires_in") <= 60
    assert datetime.fromisoformat(told.pop("expires_at")).timestamp() == int(until)
    assert told == {"key": "key", "dictionary": False, "value": [2, 0.5, {"hex": "ff"}]}


async def test_get_a_dictionary(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    subkeys: list[Any] = ["a", "b", HOSTILE, 7, b"\xff", ("t", 1)]
    for subkey in subkeys:
        await node.store("key", {"of": "it"}, in_a_minute(), subkey=subkey)
    await get_key(config, "key", (), latest=True, as_json=False)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split() == ["subkey", "value", "expires"]
    assert len(lines) == 2 + len(subkeys)
    assert all(line.isprintable() for line in lines)
    assert "[red]" in out  # markup is text
    assert lines[2].startswith('"a" ')

    await get_key(config, "key", (), latest=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["dictionary"] is True
    assert [row["subkey"] for row in told["entries"]] == ["a", "b", HOSTILE, 7, {"hex": "ff"}, ["t", 1]]
    assert told["entries"][0].keys() == {"subkey", "value", "expires_in", "expires_at"}


async def test_get_subkeys(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for subkey in ("a", "b", "c"):
        await node.store("key", subkey * 2, in_a_minute(), subkey=subkey)
    await get_key(config, "key", ["c", "a"], latest=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in told["entries"]] == ["cc", "aa"]
    with pytest.raises(NetworkError, match="key key has no subkey d, but 3 others"):
        await get_key(config, "key", ["a", "d"], latest=True, as_json=True)
    await node.store("plain", 1, in_a_minute())
    with pytest.raises(NetworkError, match="plain holds a plain value: ask without --subkey"):
        await get_key(config, "plain", ["a"], latest=True, as_json=False)
    assert capsys.readouterr().out == ""


async def test_get_what_nobody_holds(node: DhtNode, config: Any) -> None:
    with pytest.raises(NetworkError, match="key nothing: nobody holds it"):
        await get_key(config, "nothing", (), latest=True, as_json=False)


async def test_a_key_that_is_no_text(config: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be a key"):
        await get_key(config, "\udcff", (), latest=True, as_json=False)


# --- store


async def test_store(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await store_value(config, "key", '{"a": 1.0}', None, ttl=60.0, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"accepted   {node.peer_id}"
    assert lines[1].startswith("expires    in 60.0 s, ")
    found = await node.get("key")
    assert found is not None
    assert found.value == {"a": 1.0}
    assert isinstance(found.value["a"], float)
    assert 50 < found.expiration - time.time() < 61


async def test_store_a_subkey(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await store_value(config, "key", "some text", "sub", ttl=60.0, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told.pop("expires_in") == 60.0
    assert told.pop("expires_at").endswith("+00:00")
    assert told == {
        "key": "key",
        "subkey": "sub",
        "stored": True,
        "accepted": [str(node.peer_id)],
        "refused": [],
        "failed": {},
    }
    found = await node.get("key")
    assert found is not None
    assert found.value["sub"].value == "some text"


async def test_a_store_that_is_refused(
    node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    await node.store("key", "later", time.time() + 600)
    with pytest.raises(NetworkError, match="key key: no peer keeps the value"):
        await store_value(config, "key", "earlier", None, ttl=60.0, as_json=False)
    assert f"refused    {node.peer_id}: holds something that expires no earlier" in capsys.readouterr().out
    found = await node.get("key")
    assert found is not None
    assert found.value == "later"


@pytest.mark.parametrize("text", [str(1 << 70), "x" * (defaults.DHT_MAX_RECORD_BYTES + 1), "\udcff"])
async def test_values_that_cannot_be_stored(node: DhtNode, config: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="the value cannot be stored"):
        await store_value(config, "key", text, None, ttl=60.0, as_json=False)


def test_a_value_nested_too_deeply() -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_value("[" * 100_000)


# --- peers


async def test_peers(node: DhtNode, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    address = config.networks.petals.bootstrap[0]
    async with open_host(HostConfig(Identity.generate("ed25519"))) as other_host:
        other = DhtNode(other_host, RpcServer(other_host), RpcClient(other_host))
        async with other.running():
            await other.bootstrap([await other_host.connect(address)])
            await list_peers(config, as_json=True)
            told = json.loads(capsys.readouterr().out)
            await list_peers(config, as_json=False)
            table = capsys.readouterr().out
        addresses = {other.peer_id: other_host.addresses(), node.peer_id: [address]}
    assert told.keys() == {"complete", "peers"}
    assert told["complete"] is True
    rows = {row["peer"]: row for row in told["peers"]}
    assert rows.keys() == {str(node.peer_id), str(other.peer_id)}
    for one in (node, other):
        row = rows[str(one.peer_id)]
        assert row["node_id"] == str(one.node_id)
        assert row["round_trip_ms"] > 0
        assert abs(row["clock_seconds"]) < 1
        assert row["agent"].startswith("kwaainet-bridge/")
        assert [f"{text}/p2p/{one.peer_id}" for text in row["addresses"]] == addresses[one.peer_id]
        assert row["error"] == ""
        assert str(one.node_id) in table
    assert table.splitlines()[-1] == "2 peers, 2 of them answered"
    assert node.neighbours()[0].peer == other.peer_id
    assert len(node.neighbours()) == 1  # the command was not remembered


async def test_a_bootstrap_peer_without_a_dht(config: Any, host: Host) -> None:
    with pytest.raises(NetworkError, match="no bootstrap peer answers as a node of the DHT") as failed:
        await list_peers(config, as_json=False)
    assert str(host.peer_id) in str(failed.value)


def test_an_agent_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"peer": "Qm", "node_id": None, "round_trip_ms": None, "clock_seconds": "nan"}
    dht._print_peers([row | {"agent": HOSTILE, "addresses": [], "error": HOSTILE}], complete=False)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert len(out.splitlines()) == 4
    assert "there are more peers" in out


# --- all of them


async def run_each(config: Any) -> AsyncIterator[Any]:
    yield get_key(config, "key", (), latest=True, as_json=False)
    yield store_value(config, "key", "value", None, ttl=60.0, as_json=False)
    yield list_peers(config, as_json=False)


async def test_no_bootstrap_peer_is_reached() -> None:
    addresses = [nowhere(), nowhere()]
    async for command in run_each(config_of(*addresses)):
        with pytest.raises(NetworkError, match="the swarm cannot be reached") as failed:
            await command
        for address in addresses:
            assert f"{address}: cannot reach " in str(failed.value)
        assert str(failed.value).count("(tcp)") == 2


async def test_without_an_address() -> None:
    async for command in run_each(config_of()):
        with pytest.raises(ConfigError, match="--initial-peers"):
            await command


async def test_one_bootstrap_peer_is_enough(
    node: DhtNode, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    await node.store("key", "value", in_a_minute())
    lost = nowhere()
    await get_key(config_of(lost, host.addresses()[0]), "key", (), latest=True, as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["value"] == "value"
    assert f"not reached: {lost}: cannot reach" in captured.err


async def test_a_clock_that_is_wrong(host: Host) -> None:
    node = DhtNode(host, RpcServer(host), RpcClient(host), clock=lambda: time.time() + 60)
    async with node.running():
        with pytest.raises(NetworkError, match="set both by NTP"):
            await get_key(config_of(host.addresses()[0]), "key", (), latest=True, as_json=False)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def note(name: str) -> Any:
        async def noted(config: Any, *arguments: Any, **options: Any) -> None:
            await trio.lowlevel.checkpoint()
            calls.append((name, config.networks.petals.bootstrap, arguments, options))

        return noted

    for name in ("get_key", "store_value", "list_peers"):
        monkeypatch.setattr(dht, name, note(name))
    address = nowhere()
    for line in (
        "dht get k --subkey a --subkey b --first --json",
        "dht get k",
        "dht store k [1] --subkey s --ttl 5",
        "dht store k v --json",
        "dht peers",
    ):
        done = CliRunner().invoke(app, [*line.split(), "--initial-peers", address])
        assert done.exit_code == 0, done.output
    assert all(bootstrap == (address,) for _, bootstrap, _, _ in calls)
    assert [(name, arguments, options) for name, _, arguments, options in calls] == [
        ("get_key", ("k", ["a", "b"]), {"latest": False, "as_json": True}),
        ("get_key", ("k", ()), {"latest": True, "as_json": False}),
        ("store_value", ("k", "[1]", "s"), {"ttl": 5.0, "as_json": False}),
        ("store_value", ("k", "v", None), {"ttl": defaults.STORE_TTL_SECONDS, "as_json": True}),
        ("list_peers", (), {"as_json": False}),
    ]
    assert CliRunner().invoke(app, ["dht", "store", "k", "v", "--ttl", "0"]).exit_code == 2
