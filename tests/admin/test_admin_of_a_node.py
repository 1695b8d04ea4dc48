"""The admin side of whole nodes: what it tells while they start, serve, average, fail and stop."""

from __future__ import annotations

import threading
import time
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
import torch
import trio
from adapter_files import make_adapter
from admin_support import ROWS, asking, check_documented, condition_of, families, sample, table, until
from node_support import NOWHERE, PREFIX, TINY, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.averaging import Averager
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.reachability import Check
from kwaainet_bridge.node import watching
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import encode_tensor

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@asynccontextmanager
async def watched(config):
    """A node and a client of its admin side."""
    async with running_node(config) as node, asking(config.admin_address) as client:
        yield node, client


def request(blocks: range, tokens: int = 1, **metadata) -> ExpertRequest:
    return ExpertRequest(
        uid=" ".join(f"{PREFIX}.{block}" for block in blocks),
        tensors=[encode_tensor(torch.zeros(1, tokens, 64)), encode_tensor(torch.empty(0))],  # no prompts
        metadata=msgpack.pack(metadata),
    )


async def test_status_and_metrics_of_a_node_in_both_networks(tmp_path):
    """Every value of the status is documented with its type, and every documented metric is there, without a peer."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running_node(node_config(tmp_path, "first")))
        kwaai = await stack.enter_async_context(running_node(node_config(tmp_path, "kwaai")))
        networks = {"petals": {"bootstrap": [first.address]}, "kwaainet": {"bootstrap": [kwaai.address]}}
        config = node_config(tmp_path, "node", blocks="0:2", networks=networks)
        adapter = await trio.to_thread.run_sync(make_adapter, tmp_path / "french", TINY)
        model = config.model.model_copy(update={"adapters": (str(adapter),), "offload_idle_seconds": 60.0})
        config = config.model_copy(update={"model": model})
        node, client = await stack.enter_async_context(watched(config))
        await node.serving()
        await until(lambda: is_ready(client))
        host = await stack.enter_async_context(open_host(HostConfig(Identity.generate("ed25519"), listen=())))
        peer = await host.connect(node.address)
        calls = RpcClient(host)

        async with calls.stream(peer, methods.RPC_INFERENCE, open_timeout=5) as call:
            for tokens in (3, 1):
                await call.send(request(range(2), tokens, max_length=8))
                await call.receive(timeout=10)
            await calls.call(peer, methods.RPC_FORWARD, request(range(2), 5), timeout=10)

            status = (await client.get("/api/status")).json()
            met = check_documented(status)
            assert status["ready"]
            assert status["peer_id"] == str(node.contact.peer_id)
            assert status["addresses"] == list(node.contact.addresses)
            assert status["networks"]["petals"]["bootstrap"] == {
                "total": 1,
                "reached": [str(first.contact.peer_id)],
            }
            (model,) = status["models"]
            petals, kwaainet = model["networks"]["petals"], model["networks"]["kwaainet"]
            assert status["networks"]["petals"]["served"] == petals["served"]
            assert petals["announced"]["peers"] == {str(first.contact.peer_id): 3}
            assert kwaainet["announced"]["peers"] == {str(kwaai.contact.peer_id): 4}
            assert (petals["sessions"], kwaainet["sessions"]) == (1, 0)
            assert petals["served"].pop("timed_steps") == 2
            times = petals["served"].pop("step_seconds")
            assert list(times) == ["read", "engine", "reply"]
            assert all(0 < seconds < 10 for seconds in times.values())
            assert petals["served"] == {
                "steps": 2,
                "step_tokens": 4,
                "passes": 1,
                "pass_tokens": 5,
                "refused": 0,
                "received_bytes": {"NONE": 9 * 64 * 4},
                "sent_bytes": {"NONE": 9 * 64 * 4},
            }
            assert model["name"] == PREFIX
            assert (model["blocks"]["first"], model["blocks"]["end"]) == (0, 2)
            assert model["blocks"]["adapters"] == ["french"]
            assert model["blocks"]["quantization"] == "none"
            assert 0 < model["blocks"]["weights_bytes"] < 1 << 20
            assert model["cache"] == {"tokens_total": 16384, "tokens_left": 16384 - 16}  # a page
            assert status["host"]["connections"]["inbound"] >= 1

            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            found = families(answer.text)
            check_metrics(found)
            for known in (node, first, kwaai):
                assert str(known.contact.peer_id) not in answer.text
            assert str(host.peer_id) not in answer.text
            assert sample(found, "ready") == 1
            assert sample(found, "steps", model=PREFIX, network="petals") == 2
            assert sample(found, "tokens", model=PREFIX, network="petals", kind="step") == 4
            assert sample(found, "sessions", model=PREFIX, network="petals") == 1
            assert sample(found, "cache_tokens", model=PREFIX, state="used") == 16
            assert sample(found, "condition", condition="announced kwaainet", model=PREFIX) == 1
            assert sample(found, "dht_records", model=PREFIX, network="petals", outcome="by_others") >= 3
            assert sample(found, "bootstrap_peers_reached", network="kwaainet") == 1
            assert found["kwaainet_bridge_event_loop_lag_seconds"].samples
            assert found["process_resident_memory_bytes"].samples

            # one session more than fits is refused, and told
            async with calls.stream(peer, methods.RPC_INFERENCE, open_timeout=5) as greedy:
                await greedy.send(request(range(2), max_length=1 << 30))
                with pytest.raises(Exception, match="Cannot allocate"):
                    await greedy.receive(timeout=10)
            found = families((await client.get("/metrics")).text)
            assert sample(found, "requests_refused", model=PREFIX, network="petals") == 1

        undone = set(ROWS) - met
        assert all(
            key.startswith(("averaging.", "degraded.", "models[].degraded.", "models[].loading.", "problems"))
            or "null" in ROWS[key]
            for key in undone
        ), undone


async def is_ready(client) -> bool:
    return (await client.get("/readyz")).status_code == 200


DOCUMENTED = {
    row[0]: (row[1], tuple(label.strip(" `") for label in row[2].split(",") if label))
    for row in table("Metrics")
}


def check_metrics(found: dict) -> None:
    """The metrics are those of docs/monitoring.md: names, types and labels."""
    ours = {
        name.removeprefix("kwaainet_bridge_"): f
        for name, f in found.items()
        if not name.startswith("process_")
    }
    ours["build"] = ours.pop("build_info")  # the text format has no type of its own for it
    assert set(ours) == set(DOCUMENTED)
    for name, family in ours.items():
        kind, labels = DOCUMENTED[name]
        assert family.type == ("gauge" if kind == "info" else kind), name
        for one in family.samples:
            assert set(one.labels) - {"le"} == set(labels), name


async def test_a_node_that_starts_serves_and_drains(tmp_path):
    config = node_config(tmp_path, "node", bootstrap=[NOWHERE], blocks="0:2")
    async with watched(config) as (node, client):
        assert (await condition_of(client, "serving")).reason.startswith(("bootstrapping", "loading"))
        assert (await condition_of(client, "blocks")).code == 503
        assert (await client.get("/livez")).status_code == 200
        await node.serving()
        assert (await condition_of(client, "serving")).met
        assert (await condition_of(client, "blocks")).met
        alone = await condition_of(client, "announced petals")
        assert (alone.met, alone.code) == (False, 503)
        assert "no other node was asked" in alone.reason
        status = (await client.get("/api/status")).json()
        assert status["degraded"] == {"bootstrap petals": "none of 1 bootstrap peers is reached"}

        async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
            peer = await host.connect(node.address)
            calls = RpcClient(host).stream(peer, methods.RPC_INFERENCE, open_timeout=5)
            async with calls as call:
                await call.send(request(range(2), max_length=8))
                await call.receive(timeout=10)
                node.stop.set()
                await until(lambda: is_draining(client))
                assert not (await condition_of(client, "serving")).met
                assert (await client.get("/api/status")).json()["networks"]["petals"]["sessions"] == 1
        hung = await trio.open_unix_socket(str(config.admin_address.path))
        await hung.send_all(b"GET /metr")
        with trio.fail_after(10):
            await node.drained()
        with pytest.raises(httpx.TransportError):
            await client.get("/livez")
        await hung.aclose()
    assert not config.admin_address.path.exists()


async def is_draining(client) -> bool:
    return "draining" in (await condition_of(client, "serving")).reason


async def test_an_engine_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(watching.watch_engine, "__kwdefaults__", {"period": 0.05, "patience": 0.2})
    async with watched(node_config(tmp_path, "node", blocks="0:1")) as (node, client):
        await node.serving()
        assert (await condition_of(client, "engine")).met
        hang, hangs = threading.Event(), threading.Event()

        def work() -> None:
            hangs.set()
            assert hang.wait(20)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.served.engine._compute.run, work)
            await until(lambda: condition_is(client, "engine", met=False))
            assert "gave no turn within 0.2 s" in (await condition_of(client, "engine")).reason
            assert (await client.get("/livez")).status_code == 200
            hang.set()
        await until(lambda: condition_is(client, "engine", met=True))


async def condition_is(client, name: str, *, met: bool) -> bool:
    return (await condition_of(client, name)).met is met


async def test_a_clock_that_is_wrong(tmp_path):
    """The only bootstrap peer has another time."""
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=LOOPBACK)) as host:
        dht = DhtNode(host, RpcServer(host), RpcClient(host), clock=lambda: time.time() + 60)
        async with (
            dht.running(),
            watched(node_config(tmp_path, "node", bootstrap=host.addresses())) as (_node, client),
        ):
            await until(lambda: condition_is(client, "clock", met=False))
            told = await condition_of(client, "clock")
            assert "set this machine's clock by NTP" in told.reason
            assert told.code == 503


async def test_a_node_that_nobody_can_dial(tmp_path, monkeypatch):
    """Its checks say so: they are put in the place of peers' answers."""
    from kwaainet_bridge.node.reachability import ReachabilityWatch

    made = []
    judge = ReachabilityWatch._judge
    monkeypatch.setattr(ReachabilityWatch, "_judge", lambda self: (made.append(self), judge(self))[1])
    async with watched(node_config(tmp_path, "node", blocks="0:1")) as (node, client):
        await node.serving()
        assert (await condition_of(client, "reachable")).met
        for n in range(5):
            peer = Identity.generate("ed25519").peer_id
            made[0]._reachability.note(Check(peer, "AutoNAT", False, True, trio.current_time() + n, None))
        made[0]._judge()
        told = await condition_of(client, "reachable")
        assert (told.met, told.code) == (False, 503)
        assert "forward its TCP port" in told.reason
        await until(lambda: condition_is(client, "announced petals", met=False))
        assert "OFFLINE" in (await condition_of(client, "announced petals")).reason


async def test_a_slow_scraper_takes_no_time_from_the_loop(tmp_path):
    """Many clients that read nothing, while the loop's lag is measured."""
    config = node_config(tmp_path, "node")
    async with watched(config) as (node, client):
        await node.serving()
        await client.get("/metrics")  # what serves it is loaded
        slow = [await trio.open_unix_socket(str(config.admin_address.path)) for _ in range(20)]
        for stream in slow:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        with trio.fail_after(30):
            began = time.perf_counter()
            for _ in range(10):
                assert (await client.get("/livez")).status_code == 200
            assert time.perf_counter() - began < 20
            await node.drained()
        for stream in slow:
            await stream.aclose()


async def test_no_admin_side_where_it_is_off(tmp_path):
    config = node_config(tmp_path, "node", admin={"listen": "off"})
    async with running_node(config) as node:
        await node.serving()
        assert config.admin_address is None
        assert not list(tmp_path.glob("*.sock"))
        await node.drained()


RUN = {"prefix": "run", "matchmaking_seconds": 1.0, "target_group_size": 2, "part_kib": 1}


async def test_a_run_while_a_group_of_two_averages(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "AVERAGING_HELP_RETRY_SECONDS", 1.0)
    monkeypatch.setitem(Averager.__init__.__kwdefaults__, "part_seconds", 1.5)
    config = node_config(tmp_path, "helper", averaging={"runs": [RUN]})
    async with AsyncExitStack() as stack:
        node, client = await stack.enter_async_context(watched(config))
        await node.serving()
        await until(lambda: degraded(client, "averaging run"))
        peer = await stack.enter_async_context(open_peer([node.address], listen=LOOPBACK))
        averager = await stack.enter_async_context(
            Averager(
                peer,
                [torch.full((3000,), 2.0)],
                prefix="run",
                target_group_size=2,
                matchmaking_seconds=1.0,
                part_bytes=1024,
            )
        )
        pair = {str(node.contact.peer_id), str(peer.peer_id)}
        await until(lambda: looks(client))

        await averager.lock.acquire()  # the group begins, and waits for this member's values
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: averager.step(timeout=30))
            await until(lambda: averages(client))
            run = (await client.get("/api/status")).json()["averaging"]["run"]
            assert set(run["group"]) == pair
            found = families((await client.get("/metrics")).text)
            assert sample(found, "averaging_group_size", run="run") == 2
            averager.lock.release()
        await until(lambda: rounds(client, 1))
        answer = (await client.get("/api/status")).json()
        check_documented(answer)
        run = answer["averaging"]["run"]
        assert set(run["last_group"]) == pair
        assert run["received_bytes"] > 0
        assert run["sent_bytes"] > 0
        assert run["steps"]["whole"] >= 1
        assert run["banned"] == []

        # the next round: its partner begins, and never sends a part
        await averager.lock.acquire()
        with trio.CancelScope() as stalled:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: averager.step(timeout=30))
                await until(lambda: averages(client))
                stalled.cancel()
        await until(lambda: banned(client))
        run = (await client.get("/api/status")).json()["averaging"]["run"]
        assert {ban["peer"] for ban in run["banned"]} == {str(peer.peer_id)}
        assert all(ban["reason"] and ban["at"] > time.time() - 60 for ban in run["banned"])
        kinds = {ban["kind"] for ban in run["banned"]}
        text = (await client.get("/metrics")).text
        found = families(text)
        assert sum(sample(found, "averaging_bans", run="run", reason=kind) for kind in kinds) == len(
            run["banned"]
        )
        assert sample(found, "averaging_steps", run="run", outcome="partial") >= 1
        assert sample(found, "averaging_bytes", run="run", direction="received") > 0
        assert not any(peer in text for peer in pair)
        check_documented((await client.get("/api/status")).json())


async def run_of(client) -> dict | None:
    return (await client.get("/api/status")).json()["averaging"].get("run")


async def degraded(client, condition: str) -> bool:
    return condition in (await client.get("/api/status")).json()["degraded"]


async def looks(client) -> bool:
    return await run_of(client) is not None


async def averages(client) -> bool:
    run = await run_of(client)
    return run is not None and run["phase"] == "averaging"


async def rounds(client, count: int) -> bool:
    return (await run_of(client))["rounds"] >= count


async def banned(client) -> bool:
    return bool((await run_of(client))["banned"])
