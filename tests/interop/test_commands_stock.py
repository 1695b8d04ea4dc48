"""``dht`` and ``swarm`` in networks of stock peers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from child_processes import Driver
from our_nodes import start_node, wait_until_ready
from stock_swarm import (
    ROOT,
    START_SECONDS,
    StockEnvironment,
    StockPeer,
    start_bootstrap,
    start_server,
    wait_until_serving,
)

COMMAND = Path(sys.executable).with_name("kwaainet-bridge")
LLAMA = ROOT / "tests" / "vectors" / "petals-tiny-llama" / "model"  # 8 blocks
PREFIX = "tiny-commands-hf"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def told_by(*arguments: str) -> Any:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def stock_nodes(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("dht_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver
        driver.ask("shutdown")


def test_dht(stock_nodes: Driver) -> None:
    first = stock_nodes.ask("start", initial_peers=[])
    others = [stock_nodes.ask("start", initial_peers=first["addresses"]) for _ in range(3)]
    stock_nodes.ask("start", initial_peers=first["addresses"], client_mode=True)
    at = ("--initial-peers", first["addresses"][0])

    # what stock nodes stored
    items = [
        {"key": "plain", "value": [1, 2.5, None, {"a": "b"}], "ttl": 300},
        {"key": "many", "value": 1.0, "subkey": "one", "ttl": 300},
        {"key": "many", "value": "zwei", "subkey": "two", "ttl": 200},
    ]
    assert stock_nodes.ask("store", node=others[0]["node"], items=items) == [True] * 3
    plain = told_by("dht", "get", "plain", *at)
    assert plain["value"] == [1, 2.5, None, {"a": "b"}]
    assert 200 < plain["expires_in"] <= 300
    many = told_by("dht", "get", "many", *at)
    assert {row["subkey"]: row["value"] for row in many["entries"]} == {"one": 1.0, "two": "zwei"}
    shown = call("dht", "get", "many", "--subkey", "two", *at)
    assert '"two"   "zwei"  in 1' in shown.stdout

    # what we store
    stored = told_by("dht", "store", "ours", '{"rate": 1.0, "list": [1, "x"]}', "--ttl", "100", *at)
    peers = {first["peer"], *(other["peer"] for other in others)}
    assert set(stored["accepted"]) == peers
    assert (stored["refused"], stored["failed"]) == ([], {})
    for subkey, text in (("a", "some text"), ("b", '"5"'), ("c", "5")):
        assert told_by("dht", "store", "ours too", text, "--subkey", subkey, *at)["stored"] is True
    found = stock_nodes.ask("get", node=others[2]["node"], keys=["ours", "ours too"])
    assert found["ours"]["value"] == {"rate": 1.0, "list": [1, "x"]}
    assert isinstance(found["ours"]["value"]["rate"], float)
    assert 50 < found["ours"]["expiration"] - time.time() <= 100
    subkeys = {subkey: entry["value"] for subkey, entry in found["ours too"]["subkeys"].items()}
    assert subkeys == {"a": "some text", "b": "5", "c": 5}

    # negative twins: a record that expires sooner is refused, and nothing is nothing
    refused = call("dht", "store", "plain", "sooner", "--ttl", "10", *at)
    assert refused.returncode == 1
    assert refused.stdout.count("refused  ") == 4
    assert "no peer keeps the value" in refused.stderr
    nothing = call("dht", "get", "nothing", *at)
    assert nothing.returncode == 1
    assert "key nothing: nobody holds it" in nothing.stderr

    # who is there
    walked = told_by("dht", "peers", *at)
    assert walked["complete"] is True
    assert {row["peer"] for row in walked["peers"]} == peers
    for row in walked["peers"]:
        assert row["error"] == ""
        assert abs(row["clock_seconds"]) < 1
        assert 0 < row["round_trip_ms"] < 3000
        assert any(address.startswith("/ip4/127.0.0.1/tcp/") for address in row["addresses"])
        assert row["agent"]
    for node in (first, *others):  # no command left itself in a table
        assert set(stock_nodes.ask("known", node=node["node"])) <= peers


def test_records_that_stock_has_signed(stock_nodes: Driver) -> None:
    theirs = stock_nodes.ask("dht", initial_peers=[], signing=True)
    at = ("--initial-peers", theirs["addresses"][0])
    owned = f"progress {theirs['owner']}"
    items = [{"key": "run", "value": {"step": 7}, "subkey": owned, "ttl": 300}]
    assert stock_nodes.ask("store", node=theirs["node"], items=items) == [True]
    (entry,) = told_by("dht", "get", "run", *at)["entries"]
    assert (entry["subkey"], entry["value"]) == (owned, {"step": 7})

    stolen = call("dht", "store", "run", "8", "--subkey", owned, "--ttl", "600", *at)
    assert stolen.returncode == 2
    assert "this node's own record validator refuses the record" in stolen.stderr
    found = stock_nodes.ask("get", node=theirs["node"], keys=["run"])
    assert found["run"]["subkeys"][owned]["value"] == {"step": 7}


def test_a_stock_peer_without_a_dht(stock_peer: StockPeer) -> None:
    for arguments in (("dht", "get", "key"), ("dht", "store", "key", "value"), ("swarm",)):
        done = call(*arguments, "--initial-peers", stock_peer.address)
        assert done.returncode == 1
        assert f"the swarm cannot be reached:\n  {stock_peer.address}: " in done.stderr
    done = call("dht", "peers", "--initial-peers", stock_peer.address)
    assert done.returncode == 1
    assert "no bootstrap peer answers as a node of the DHT" in done.stderr


@pytest.mark.slow
def test_swarm(stock: StockEnvironment, tmp_path: Path) -> None:
    bootstrap, address = start_bootstrap(stock)
    at = ("--initial-peers", address)
    with bootstrap:
        options = ("--public_name", "[red]stock[/]")
        stock_server = start_server(
            stock, LLAMA, prefix=PREFIX, blocks=range(3), peers=[address], options=options
        )
        node = start_node(
            tmp_path,
            "ours",
            model=LLAMA,
            prefix=PREFIX,
            blocks=range(2, 6),
            peers=[address],
            public_name="us",
        )
        with stock_server, node:
            wait_until_serving(stock_server)
            ours = wait_until_ready(node).rpartition("/p2p/")[2]
            (network,) = told_by("swarm", *at)["networks"]
            shown = call("swarm", *at)
    (model,) = network["models"]
    assert (model["prefix"], model["num_blocks"]) == (PREFIX, 8)
    assert model["servers_per_block"] == [1, 1, 2, 1, 1, 1, 0, 0]
    assert model["gaps"] == [[6, 8]]
    stock_row, our_row = model["servers"]
    assert (stock_row["blocks"], stock_row["public_name"]) == ([0, 3], "[red]stock[/]")
    assert (our_row["blocks"], our_row["public_name"], our_row["peer"]) == ([2, 6], "us", ours)
    for row in model["servers"]:
        assert row["state"] == "online"
        assert row["version"]
        assert row["cache_tokens_left"] > 0
        assert row["check"]["reachable"] is True
        assert row["check"]["round_trip_ms"] > 0
    assert shown.returncode == 0, shown.stderr
    assert "0 11#111.. 8" in shown.stdout
    assert "no server is online for blocks 6:8" in shown.stdout
    assert "[red]stock[/]" in shown.stdout
