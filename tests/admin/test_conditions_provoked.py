"""Each condition of readiness, missed and met again for real: a whole node, its peers, and `/readyz` over HTTP."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import trio
from admin_support import asking, condition_of, families, sample, until
from node_support import PREFIX, TINY, RunningNode, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import loading
from kwaainet_bridge.engine.scheduler import Scheduler
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.dht.validation import RecordValidator
from kwaainet_bridge.net import HostConfig, libp2p_host, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node import watching
from kwaainet_bridge.node.announcing import Announcer, PetalsPublisher
from kwaainet_bridge.rpc import RpcClient, RpcServer

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
STORE = "DHTProtocol.rpc_store"


@asynccontextmanager
async def watched(config: Any) -> AsyncIterator[tuple[RunningNode, httpx.AsyncClient]]:
    async with running_node(config) as node, asking(config.admin_address) as client:
        yield node, client


async def unmet(client: httpx.AsyncClient, *, model: str | None = None) -> dict[str, str]:
    """Reasons of the conditions that are not met, by their names."""
    answer = await client.get("/readyz")
    found = {c["name"]: c["reason"] for c in answer.json()["conditions"] if not c["met"]}
    assert answer.status_code == (503 if found else 200)
    assert answer.json()["ready"] is (not found)
    if model is not None:
        return {
            c["name"]: c["reason"]
            for c in answer.json()["conditions"]
            if not c["met"] and c["model"] == model
        }
    return found


async def ready(client: httpx.AsyncClient) -> None:
    async def holds() -> bool:
        return not await unmet(client)

    await until(holds)


async def missed(client: httpx.AsyncClient, name: str) -> str:
    """Why the condition is not met, once it is not."""
    reasons: list[str] = []

    async def holds() -> bool:
        reasons[:] = filter(None, [(await unmet(client)).get(name)])
        return bool(reasons)

    await until(holds)
    return reasons[0]


class Refuses(RecordValidator):
    """Lets no record in while ``all_of_them``."""

    all_of_them = False

    def validate(self, record: object) -> bool:  # noqa: ARG002 - whatever it is
        return not self.all_of_them


@asynccontextmanager
async def bootstrap_peer(
    *, clock: Callable[[], float] = time.time, client_mode: bool = False
) -> AsyncIterator[SimpleNamespace]:
    """A peer with a DHT that the test can spoil."""
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=LOOPBACK)) as host:
        validator = Refuses()
        dht = DhtNode(
            host, RpcServer(host), RpcClient(host), validator=validator, clock=clock, client_mode=client_mode
        )
        async with dht.running():
            yield SimpleNamespace(host=host, address=host.addresses()[0], validator=validator)


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are renewed several times a second."""
    monkeypatch.setitem(Announcer.__init__.__kwdefaults__, "period", 0.2)


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("network", ["petals", "kwaainet"])
async def test_records_that_all_bootstrap_peers_refuse(tmp_path: Path, network: str) -> None:
    async with bootstrap_peer() as first, bootstrap_peer() as second:
        networks = {"petals": {}, network: {"bootstrap": [first.address, second.address]}}
        config = node_config(tmp_path, "node", blocks="0:1", networks=networks)
        async with watched(config) as (node, client):
            await node.serving()
            await ready(client)
            first.validator.all_of_them = True
            announced = node.state.models[PREFIX].announced[network]
            rounds = announced.rounds

            async def two_rounds_more() -> bool:
                return announced.rounds >= rounds + 2

            await until(two_rounds_more)
            assert await unmet(client) == {}, "the other one keeps them"
            second.validator.all_of_them = True
            reason = await missed(client, f"announced {network}")
            for peer in (first, second):
                assert f"{peer.host.peer_id.short} keeps 0" in reason
            found = families((await client.get("/metrics")).text)
            assert sample(found, "condition", condition=f"announced {network}", model=PREFIX) == 0
            assert sample(found, "ready") == 0
            assert sample(found, "announced_records", model=PREFIX, network=network) == 0
            first.validator.all_of_them = False
            await ready(client)


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("network", ["petals", "kwaainet"])
async def test_records_that_nobody_can_take(tmp_path: Path, network: str) -> None:
    """The only peer answers everything else."""
    async with bootstrap_peer() as peer:
        networks = {"petals": {}, network: {"bootstrap": [peer.address]}}
        async with watched(node_config(tmp_path, "node", blocks="0:1", networks=networks)) as (node, client):
            await node.serving()
            await ready(client)
            peer.host.unserve(STORE)
            reason = await missed(client, f"announced {network}")
            assert f"{peer.host.peer_id.short}: {peer.host.peer_id} does not serve {STORE}" in reason
            assert set(await unmet(client)) == {f"announced {network}"}


@pytest.mark.usefixtures("short_rounds")
async def test_the_only_bootstrap_peer_goes(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        leave = trio.CancelScope()

        async def live(task_status: Any) -> None:
            with leave:
                async with bootstrap_peer() as peer:
                    task_status.started(peer)
                    await trio.sleep_forever()

        peer = await nursery.start(live)
        config = node_config(tmp_path, "node", blocks="0:1", bootstrap=[peer.address])
        async with watched(config) as (node, client):
            await node.serving()
            await ready(client)
            leave.cancel()
            await missed(client, "announced petals")
            assert (await client.get("/livez")).status_code == 200
            status = (await client.get("/api/status")).json()
            assert "announced petals" in {problem["name"] for problem in status["problems"]}


async def test_records_that_expire_before_they_are_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Announcer.__init__.__kwdefaults__, "period", 2.5)
    monkeypatch.setattr(PetalsPublisher, "lifetime", 1.0)
    async with bootstrap_peer() as peer:
        config = node_config(tmp_path, "node", blocks="0:1", bootstrap=[peer.address])
        async with watched(config) as (node, client):
            await node.serving()
            reason = await missed(client, "announced petals")
            assert reason.startswith("the records have expired: 2 of 2 records kept by others, ")
            await ready(client)


async def test_a_clock_that_is_off_and_set_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "DHT_JOIN_RETRY_SECONDS", 0.2)
    ahead = [60.0]
    async with bootstrap_peer(clock=lambda: time.time() + ahead[0]) as peer:
        config = node_config(tmp_path, "node", bootstrap=[peer.address])
        async with watched(config) as (node, client):
            await node.serving()
            reason = await missed(client, "clock")
            assert "1 of 1 bootstrap peers have another time, one is +60.0 s ahead" in reason
            ahead[0] = 0.0
            await ready(client)


@pytest.mark.parametrize("relay", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_port_that_nobody_gets_through_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relay: bool
) -> None:
    """As behind a firewall that says nothing: connections to it are never answered.

    Then the firewall lets them pass, or the peer has begun to relay.
    """
    monkeypatch.setattr(defaults, "AUTONAT_DIAL_SECONDS", 0.5)
    monkeypatch.setattr(defaults, "AUTONAT_DIALS_PER_PEER", 1000)
    monkeypatch.setattr(defaults, "AUTONAT_DIALS", 1000)
    monkeypatch.setattr(defaults, "PRIVATE_PERIOD_SECONDS", 0.3)
    monkeypatch.setattr(defaults, "REACHABILITY_RETRY_SECONDS", 0.3)
    no_service = {"relay_service": False}
    async with running_node(node_config(tmp_path, "first", reachability=no_service)) as first:
        await first.serving()
        opened, accept = trio.Event(), libp2p_host.accept

        async def behind_a_firewall(*args: Any) -> None:
            await opened.wait()
            await accept(*args)

        monkeypatch.setattr(libp2p_host, "accept", behind_a_firewall)
        config = node_config(tmp_path, "node", blocks="0:1", bootstrap=[first.address])
        async with watched(config) as (node, client):
            monkeypatch.setattr(libp2p_host, "accept", accept)  # those who dial it listen as always
            await node.serving()
            reason = await missed(client, "reachable")
            assert "0 of 1 peers of its own network got through (AutoNAT)" in reason
            assert "forward its TCP port in the router and open it in the firewall" in reason
            announced = (await unmet(client))["announced petals"]
            assert "nothing was announced yet" in announced or "OFFLINE" in announced
            found = families((await client.get("/metrics")).text)
            assert sample(found, "reachability", verdict="unreachable") == 1
            if relay:
                first.state.host.traversal.offer(True)
            else:
                opened.set()
            await ready(client)
            evidence = (await condition_of(client, "reachable")).reason
            assert ("places at 1 relays" if relay else "1 of 1") in evidence
            found = families((await client.get("/metrics")).text)
            assert sample(found, "reachability", verdict="relayed" if relay else "public") == 1


async def test_a_compute_thread_that_dies_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is not ready and withdraws its records; then it loads the blocks anew, though it has no other model."""
    monkeypatch.setattr(defaults, "MODEL_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(watching.watch_engine, "__kwdefaults__", {"period": 0.05, "patience": 5.0})
    async with watched(node_config(tmp_path, "node", blocks="0:1")) as (node, client):
        await node.serving()
        await ready(client)
        assert node.served is not None
        died = weakref.ref(node.served.engine)
        thread = node.served.engine._compute._thread

        def broken(_self: object, _now: float) -> list[int]:
            raise RuntimeError("what nobody expected")

        with monkeypatch.context() as once:
            once.setattr(Scheduler, "next", broken)
            reason = await missed(client, "blocks")
        told = "the compute thread has died of RuntimeError: what nobody expected"
        await until(lambda: says(client, "blocks", f"{told}; tried again every 0 s"))
        assert reason.startswith("not loaded: ")
        assert not thread.is_alive()
        assert (await client.get("/livez")).status_code == 200
        status = (await client.get("/api/status")).json()
        assert told in status["models"][0]["degraded"]["blocks"]
        assert "engine" not in status["models"][0]["degraded"]  # or a service manager would restart the node
        assert sample(families((await client.get("/metrics")).text), "ready") == 0
        await ready(client)
        gc.collect()
        assert died() is None
        await node.drained()


@pytest.mark.slow
async def test_processes_that_share_a_model_are_replaced_if_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MODEL_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(watching.watch_engine, "__kwdefaults__", {"period": 0.05, "patience": 30.0})
    config = node_config(tmp_path, "node", blocks="0:2")
    config = config.model_copy(update={"model": config.model.model_copy(update={"tensor_parallel": 2})})
    async with watched(config) as (node, client):
        await node.serving()
        await ready(client)
        (process,) = multiprocessing.active_children()
        process.kill()
        await until(lambda: says(client, "blocks", "no longer work together (one has ended)"))

        async def holds() -> bool:
            return not await unmet(client)

        await until(holds, 60)
        (other,) = multiprocessing.active_children()
        assert other.pid != process.pid
        assert node.served is not None
        with trio.fail_after(20):
            await node.served.engine.forward(torch.zeros(1, 3, 64), range(2))
        await node.drained()


async def test_blocks_that_do_not_load_until_their_files_are_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MODEL_RETRY_SECONDS", 0.2)
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    whole = {file: file.read_bytes() for file in broken.glob("*.safetensors")}
    for file, content in whole.items():
        file.write_bytes(content[:2000])
    more = {"blocks": "0:1", "throughput": 1.0, "threads": 1, "cache_tokens": 256}
    models = [
        {"name": str(TINY), "dht_prefix": PREFIX, **more},
        {"name": str(broken), "dht_prefix": "broken", **more},
    ]
    async with watched(node_config(tmp_path, "node", models=models)) as (node, client):
        await node.serving()
        reason = await missed(client, "blocks")

        async def only_broken() -> bool:
            return not await unmet(client, model=PREFIX) and "tried again" in (await unmet(client)).get(
                "blocks", ""
            )

        await until(only_broken)
        reason = (await unmet(client, model="broken"))["blocks"]
        assert reason.startswith("not loaded: ")
        assert "safetensors" in reason
        found = families((await client.get("/metrics")).text)
        assert sample(found, "condition", condition="blocks", model="broken") == 0
        assert sample(found, "condition", condition="blocks", model=PREFIX) == 1
        for file, content in whole.items():
            file.write_bytes(content)
        await ready(client)


async def test_blocks_on_a_disk_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, complete = threading.Event(), loading._complete

    def slow(*args: Any) -> Any:
        assert read.wait(20)
        return complete(*args)

    monkeypatch.setattr(loading, "_complete", slow)
    async with watched(node_config(tmp_path, "node", blocks="0:1")) as (node, client):
        assert (await missed(client, "blocks")).startswith("not loaded: ")
        await until(lambda: says(client, "serving", "loading"))
        assert set(await unmet(client)) == {"serving", "blocks", "announced petals"}
        read.set()
        await node.serving()
        await ready(client)


async def says(client: httpx.AsyncClient, condition: str, word: str) -> bool:
    return word in (await unmet(client)).get(condition, "")
