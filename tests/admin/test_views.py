"""What a node tells of its peers, sessions and blocks: with clients that run, and with none."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest
import torch
import trio
from adapter_files import make_adapter
from admin_support import KINDS, asking, pattern, served, table, until, walk
from node_support import NOWHERE, PREFIX, TINY, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import UnixAddress
from kwaainet_bridge.engine import LoadProgress
from kwaainet_bridge.errors import CapacityDenied
from kwaainet_bridge.hivemind.client import Directory, Swarm, open_session
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.admin.views import blocks_view, sessions_view
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.readiness import BLOCKS
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import encode_tensor

ROWS = {
    row[0]: kinds for row in table("Views") if (kinds := row[1].split(" or ")) and KINDS.keys() >= set(kinds)
}
PATTERNS = {pattern(key): key for key in ROWS}
HIDDEN = 64


def check_documented(view: dict) -> set[str]:
    """Every value of a view is in the table with its type; returns the keys of the table that were met."""
    met = set()
    for path, value in walk(view):
        if re.match(r"records\[\]\0fields", path):
            continue
        key = next((key for expected, key in PATTERNS.items() if expected.fullmatch(path)), None)
        assert key is not None, f"{path!r} is not documented"
        allowed = tuple(kind for name in ROWS[key] for kind in KINDS[name])
        assert isinstance(value, allowed), (key, value)
        assert not (isinstance(value, bool) and "boolean" not in ROWS[key]), key
        met.add(key)
    return met


async def view(client, name: str) -> dict:
    answer = await client.get(f"/api/{name}")
    assert answer.status_code == 200
    check_documented(answer.json())
    return answer.json()


def hidden(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, tokens, HIDDEN)


async def test_sessions_of_both_networks_appear_with_their_counts(tmp_path):
    """A Petals client with two sessions and a KwaaiNet client with one, on a node with an adapter."""
    async with AsyncExitStack() as stack:
        networks = {"petals": {"bootstrap": []}, "kwaainet": {"bootstrap": []}}
        config = node_config(tmp_path, "node", blocks="0:8", networks=networks)
        adapter = await trio.to_thread.run_sync(make_adapter, tmp_path / "french", TINY)
        model = config.model.model_copy(update={"adapters": (str(adapter),)})
        node = await stack.enter_async_context(running_node(config.model_copy(update={"model": model})))
        client = await stack.enter_async_context(asking(config.admin_address))
        await node.serving()
        assert (await view(client, "sessions"))["sessions"] == []

        peer = await stack.enter_async_context(open_peer([node.address], client_mode=True))
        french = Swarm(peer.client, Directory(peer.dht, PREFIX, 8, adapter="french"))
        plain = Swarm(peer.client, Directory(peer.dht, PREFIX, 8))
        one = await stack.enter_async_context(open_session(french, max_length=100))
        for tokens in (20, 1, 1):
            await one.step(hidden(tokens))
        two = await stack.enter_async_context(
            open_session(plain, batch_size=3, max_length=8, blocks=range(2, 5))
        )
        await two.step(hidden(2, batch=3))
        kwaai = KwaaiClient(peer.client)
        node_id = node.contact.peer_id
        await kwaai.step_ids(node_id, 7, 0, [1, 2, 3, 4, 5])
        await kwaai.step_ids(node_id, 7, 5, [6])

        told = await view(client, "sessions")
        assert (told["schema"], told["total"], told["left_out"]) == (1, 3, 0)
        first, second, third = told["sessions"]
        times = [{key: row.pop(key) for key in ("age_seconds", "idle_seconds")} for row in told["sessions"]]
        assert all(0 <= t["idle_seconds"] <= t["age_seconds"] < 60 for t in times)
        per_token = node.served.engine.cache_bytes_per_token
        assert isinstance(first.pop("name"), str)
        assert first == {
            "kind": "served",
            "networks": ["petals"],
            "model": PREFIX,
            "peer": str(peer.peer_id),
            "is_own_peer": False,
            "first": 0,
            "end": 8,
            "state": "idle",
            "tokens": 22,
            "max_tokens": 100,
            "batch_size": 1,
            "cache_tokens": 32,  # two pages
            "cache_bytes": 32 * 8 * per_token,
            "promised_tokens": 112 - 16,  # of which one is kept for others, too
            "in_host_memory": False,
            "adapter": "french",
            "chain": [],
        }
        assert (second["first"], second["end"], second["batch_size"], second["tokens"]) == (2, 5, 3, 2)
        assert (second["cache_tokens"], second["promised_tokens"], second["adapter"]) == (48, 48, None)
        assert second["cache_bytes"] == 48 * 3 * per_token
        assert (third["networks"], third["name"], third["tokens"]) == (["kwaainet"], "7", 6)
        assert (third["first"], third["end"], third["state"]) == (0, 8, "idle")

        live = next(iter(node.served.by_network["kwaainet"]._inference.sessions._live.values()))
        async with live.lock:  # as while a step runs
            third = (await view(client, "sessions"))["sessions"][2]
            assert (third["state"], third["idle_seconds"]) == ("stepping", 0)

        blocks = await view(client, "blocks")
        assert [row["sessions"] for row in blocks["blocks"]] == [2, 2, 3, 3, 3, 2, 2, 2]
        assert sum(row["bytes"] for row in blocks["blocks"]) == node.served.engine.weights_bytes
        row = blocks["blocks"][3]
        assert 0 < row.pop("bytes") < 1 << 20
        assert row == {
            "model": PREFIX,
            "block": 3,
            "of": 8,
            "state": "serving",
            "dtype": "float32",
            "quantization": "none",
            "tensor_parallel": 1,
            "adapters": ["french"],
            "sessions": 3,
        }
        assert blocks["models"] == [{"name": PREFIX, "phase": "serving", "reason": None}]

        (row,) = [p for p in (await view(client, "peers"))["peers"] if p["peer"] == str(peer.peer_id)]
        assert (row["inbound"], row["relay"], row["bootstrap"]) == (True, None, False)
        assert row["address"].startswith("/ip4/127.0.0.1/tcp/")
        assert row["networks"] == ["kwaainet", "petals"]
        assert row["agent"].startswith("kwaainet-bridge/")
        assert 0 < row["round_trip_ms"] < 1000
        assert row["streams"] >= 2
        assert row["in_use"]

        await two.finish()
        await until(lambda: has_sessions(client, 2))


async def has_sessions(client, count: int) -> bool:
    return (await view(client, "sessions"))["total"] == count


async def test_text_that_the_node_generates_itself(tmp_path):
    """It goes through the node's own blocks, so it is seen from both ends."""
    config = node_config(
        tmp_path,
        "node",
        model={"name": "austen", "throughput": 1.0, "threads": 1},
        openai={"listen": f"unix:{tmp_path / 'openai.sock'}"},
    )
    async with running_node(config) as node, asking(config.admin_address) as client:
        await node.serving()
        text = await node.state.texts.get("austen")
        assert (await view(client, "sessions"))["total"] == 0
        ids = torch.tensor([[5, 6, 7]])
        async with open_session(text.swarm, max_length=50, ends=True) as session:
            (waiting,) = (await view(client, "sessions"))["sessions"]
            assert (waiting["kind"], waiting["tokens"], waiting["chain"]) == ("own", 0, [])
            await session.step(text.weights.embed(ids), ids=ids)
            await session.step(text.weights.embed(ids[:, :1]), ids=ids[:, :1])
            rows = {row["kind"]: row for row in (await view(client, "sessions"))["sessions"]}
            assert set(rows) == {"own", "served"}
            own, there = rows["own"], rows["served"]
            assert (own["tokens"], own["max_tokens"], own["networks"]) == (4, 50, ["petals"])
            assert (own["peer"], own["model"], own["cache_tokens"]) == (None, "austen", 0)
            assert own["chain"] == [
                {"peer": str(node.contact.peer_id), "network": "petals", "first": 0, "end": 8}
            ]
            assert (there["tokens"], there["peer"], there["is_own_peer"]) == (
                4,
                str(node.contact.peer_id),
                True,
            )
        assert (await view(client, "sessions"))["total"] == 0

        hop = Hop(Identity.generate("ed25519").peer_id, range(8))
        full = Hop(Identity.generate("ed25519").peer_id, range(8))
        denied = CapacityDenied("for ever", reason="at_capacity", retry_after=float("inf"))
        text.swarm.note_failure(full, denied)
        (trouble,) = (await view(client, "peers"))["troubles"]
        assert (trouble["reason"], trouble["seconds_left"]) == ("for ever", None)
        text.swarm.note_success(full)
        text.swarm.note_failure(hop, ConnectionError("it is gone"))
        (trouble,) = (await view(client, "peers"))["troubles"]
        assert 0 < trouble.pop("seconds_left") <= defaults.MAX_BAN_SECONDS
        assert trouble == {
            "kind": "avoided",
            "peer": str(hop.peer),
            "where": "austen in petals",
            "reason": "it is gone",
            "times": 1,
            "at": None,
        }


async def test_a_session_that_waits_for_room_and_one_that_steps(tmp_path):
    config = node_config(tmp_path, "node", blocks="0:2")
    config = config.model_copy(update={"model": config.model.model_copy(update={"cache_tokens": 16})})
    async with (
        running_node(config) as node,
        asking(config.admin_address) as client,
        open_peer([node.address], client_mode=True) as peer,
    ):
        await node.serving()
        swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, 8))
        async with open_session(swarm, max_length=16, blocks=range(2)) as session:
            await session.step(hidden(1))
            async with peer.client.stream(
                node.contact.peer_id, methods.RPC_INFERENCE, open_timeout=5
            ) as call:
                await call.send(request(16, alloc_timeout=60))
                await until(lambda: has_sessions(client, 2))
                first, second = (await view(client, "sessions"))["sessions"]
                assert (first["state"], second["state"]) == ("idle", "waiting")
                assert (second["tokens"], second["max_tokens"], second["cache_tokens"]) == (0, None, 0)
                assert (second["first"], second["end"]) == (0, 2)
                inference = node.served.by_network["petals"].inference
                live = min(inference._open, key=lambda one: one.began)
                live.idle_since = None  # as while a step runs
                assert (await view(client, "sessions"))["sessions"][0]["state"] == "stepping"


def request(max_length: int, **metadata) -> ExpertRequest:
    """The first of a session on blocks 0:2, which may wait for room."""
    return ExpertRequest(
        uid=f"{PREFIX}.0 {PREFIX}.1",
        tensors=[encode_tensor(hidden(1)), encode_tensor(torch.empty(0))],
        metadata=msgpack.pack({"max_length": max_length, **metadata}),
    )


async def test_peers_that_cannot_be_reached_or_were_turned_away(tmp_path):
    config = node_config(tmp_path, "node", bootstrap=[NOWHERE])
    async with running_node(config) as node, asking(config.admin_address) as client:
        await node.serving()
        host = node.state.host
        for _ in range(3):
            host.refused.note(
                "address", "192.0.2.1", "too many connections from this address", trio.current_time()
            )
        host.refused.note("streams", "12D3KooWx", "too many streams at one time", trio.current_time())
        told = await view(client, "peers")
        assert {scope: count for scope, count in told["refused"].items() if count} == {
            "address": 3,
            "streams": 1,
        }
        assert told["peers"] == []
        rows = {(row["kind"], row["where"]): row for row in told["troubles"]}
        assert rows["refused", "address"]["times"] == 3
        assert rows["refused", "streams"]["peer"] == "12D3KooWx"
        gone = rows["unreachable", "/ip4/127.0.0.1/tcp/1"]
        assert gone["peer"] == NOWHERE.rpartition("/")[2]
        assert gone["reason"].startswith("tcp: ")
        assert gone["times"] >= 1
        assert abs(gone["at"] - node.state.unix_time(trio.current_time())) < 60


async def test_long_answers_are_cut_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "VIEW_ROWS", 3)
    config = node_config(tmp_path, "node", blocks="0:8", bootstrap=[])
    async with running_node(config) as node, asking(config.admin_address) as client:
        await node.serving()
        for number in range(5):
            node.state.host.refused.note("connections", f"192.0.2.{number}", "full", trio.current_time())
        blocks = await view(client, "blocks")
        assert (blocks["total"], blocks["left_out"], len(blocks["blocks"])) == (8, 5, 3)
        peers = await view(client, "peers")
        assert (peers["troubles_left_out"], len(peers["troubles"])) == (2, 3)
        assert peers["troubles"][0]["peer"] == "192.0.2.4"


async def test_a_node_that_has_just_begun_tells_that_there_is_nothing(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        assert (await view(client, "peers"))["peers"] == []
        assert (await view(client, "sessions"))["sessions"] == []
        blocks = await view(client, "blocks")
        assert (blocks["blocks"], blocks["models"]) == ([], [])
        assert (await client.post("/api/peers")).status_code == 405


async def test_blocks_on_their_way_into_memory():
    state = NodeState()
    model = state.add_model("m", ["petals"])
    assert blocks_view(state)["models"] == [{"name": "m", "phase": "starting", "reason": None}]
    model.coming = range(4, 8)

    def states() -> list[str]:
        told = blocks_view(state)
        check_documented(told)
        return [row["state"] for row in told["blocks"]]

    assert states() == ["waiting"] * 4
    model.loading = LoadProgress(0, 4, 0, 400, fetched_bytes=10, missing_bytes=400)
    assert states() == ["fetching"] * 4
    model.loading = LoadProgress(1, 4, 100, 400)
    assert states() == ["loaded", "loading", "waiting", "waiting"]
    assert [row["block"] for row in blocks_view(state)["blocks"]] == [4, 5, 6, 7]
    model.coming = None
    model.degrade(BLOCKS, "it needs 9 MiB")
    told = blocks_view(state)
    assert told["blocks"] == []
    assert told["models"][0]["reason"] == "it needs 9 MiB"


@pytest.mark.parametrize("phase", [Phase.SERVING, Phase.DRAINING])
async def test_blocks_that_are_served_are_in_the_phase_of_their_model(phase):
    state = NodeState()
    model = state.add_model("m", [])
    model.phase = phase
    engine = SimpleNamespace(
        block_bytes={0: 5},
        model=SimpleNamespace(num_blocks=2, dtype=torch.bfloat16),
        quantization="nf4",
        tensor_parallel=2,
        adapters=(),
    )
    model.served = SimpleNamespace(engine=engine, by_network={})
    (row,) = blocks_view(state)["blocks"]
    assert (row["state"], row["dtype"], row["quantization"]) == (phase.value, "bfloat16", "nf4")
    assert row["tensor_parallel"] == 2


async def test_loading_tells_which_blocks_come(tmp_path, monkeypatch):
    seen, note = [], ModelState.note_loading

    def noted(model: ModelState, progress: LoadProgress) -> None:
        note(model, progress)
        seen.append((progress.blocks_done, model.coming))

    monkeypatch.setattr(ModelState, "note_loading", noted)
    async with running_node(node_config(tmp_path, "node", blocks="2:5")) as node:
        await node.serving()
        model = next(iter(node.state.models.values()))
        assert {done for done, _ in seen} == {0, 1, 2, 3}
        assert all(coming == range(2, 5) for _, coming in seen)
        assert model.coming is None
        assert [row["block"] for row in blocks_view(node.state)["blocks"]] == [2, 3, 4]
        assert sessions_view(node.state)["total"] == 0


def test_every_key_of_the_table_is_of_some_view():
    """Those that the other tests meet only sometimes, and those of the log, are told apart here."""
    prefixes = {re.split(r"[.\[]", key)[0] for key in ROWS}
    assert prefixes == {
        "schema",
        "total",
        "left_out",
        "peers",
        "refused",
        "troubles",
        "troubles_left_out",
        "sessions",
        "blocks",
        "models",
        "level",
        "missed",
        "records",
    }
