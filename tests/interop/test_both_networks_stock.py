"""Daemons of ours in both networks: a stock Petals client and a simulated KwaaiNet client use them at the same time."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from child_processes import Driver, Process
from our_nodes import start_node, wait_until_ready
from simulator import (
    TINY,
    SimulatedClient,
    SimulatedPeer,
    generate_locally,
    key_id,
    simulated_bootstrap,
    simulated_client,
)
from stock_swarm import START_SECONDS, StockEnvironment, start_bootstrap

pytestmark = pytest.mark.slow

PREFIX = "tiny-llama-hf"  # in Petals; in KwaaiNet it is TINY.prefix
ALL, FIRST, LAST = range(8), range(4), range(4, 8)
PROMPTS = [[1, 42, 99, 7, 300], [5, 9, 17, 33, 65, 129, 257, 3, 7, 15], [1, 371, 200]]
TOKENS = 20
PETALS_ROUNDS = 4
CACHE_TOKENS = 1 << 17
"""KwaaiNet's sessions have no end, and a new one makes room of an old one only after 30 s: room for all texts of a test."""
SEEN_SECONDS = 5.0
"""Within which both networks know that a node leaves."""


@pytest.fixture(scope="module")
def client(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("petals_client.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver


@dataclass
class Networks:
    """A swarm of each network, daemons that are in both, and a client of each."""

    daemons: list[Process]
    peers: list[str]
    petals: Driver
    key: str
    kwaainet: SimulatedClient
    boot: SimulatedPeer

    async def ask(self, do: str, **arguments: Any) -> Any:
        return await self.petals.aask(do, key=self.key, **arguments)

    async def petals_generates(self, prompt: list[int]) -> None:
        tokens = await self.ask("generate", ids=[prompt], new_tokens=TOKENS)
        assert tokens["swarm"] == tokens["local"]
        assert len(tokens["swarm"][0]) == TOKENS

    async def petals_states(self) -> set[tuple[str, str]]:
        """(peer, state) of whoever has a record of the model's blocks."""
        records = await self.ask("records", uids=[f"{PREFIX}.{block}" for block in ALL])
        return {(peer, server["state"]) for block in records.values() for peer, server in block.items()}


@asynccontextmanager
async def both_networks(
    stock: StockEnvironment, client: Driver, folder: Path, *spans: range
) -> AsyncIterator[Networks]:
    """One daemon for each span. Blocking calls run in threads: KwaaiNet's bootstrap peer lives in this process."""
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        petals_boot, address = await trio.to_thread.run_sync(start_bootstrap, stock)
        stack.enter_context(petals_boot)
        networks = {
            "petals": {"bootstrap": [address]},
            "kwaainet": {"bootstrap": [boot.address], "dht_prefix": TINY.prefix},
        }
        daemons = []
        for span in spans:
            name = f"daemon-{span.start}"
            served = {"model": TINY.folder, "prefix": PREFIX, "blocks": span, "cache_tokens": CACHE_TOKENS}
            daemon = start_node(folder, name, **served, networks=networks)
            daemons.append(stack.enter_context(daemon))
        peers = [
            (await trio.to_thread.run_sync(wait_until_ready, daemon)).rpartition("/p2p/")[2]
            for daemon in daemons
        ]
        key = folder.name
        loaded = {"model": str(TINY.folder), "prefix": PREFIX, "peers": [address]}
        await client.aask("load", key=key, within=START_SECONDS, **loaded)
        kwaainet = await stack.enter_async_context(simulated_client(bootstrap=[boot]))
        yield Networks(daemons, peers, client, key, kwaainet, boot)
        assert boot.complaints == kwaainet.complaints == []
        await client.aask("forget", key=key)


@pytest.mark.parametrize("spans", [(ALL,), (FIRST, LAST)], ids=["one daemon", "two daemons"])
async def test_clients_of_both_networks_generate_at_the_same_time(
    stock: StockEnvironment, client: Driver, tmp_path: Path, spans: tuple[range, ...]
) -> None:
    """Texts of one network begin and end while those of the other go on; each is what one local model says."""
    boundaries = [span.start for span in spans[1:]]
    expected = [generate_locally(TINY, prompt, TOKENS, boundaries=boundaries) for prompt in PROMPTS]
    async with both_networks(stock, client, tmp_path, *spans) as networks:
        petals_is_done = False
        texts = 0

        async def by_kwaainet() -> None:
            nonlocal texts
            while not petals_is_done or texts < len(PROMPTS):
                number = texts % len(PROMPTS)
                assert await networks.kwaainet.generate(PROMPTS[number], TOKENS) == expected[number]
                texts += 1

        with trio.fail_after(150):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(by_kwaainet)
                for number in range(PETALS_ROUNDS):
                    await networks.petals_generates(PROMPTS[number % len(PROMPTS)])
                petals_is_done = True
        assert texts >= len(PROMPTS)
        assert networks.kwaainet.failures == networks.kwaainet.denials == []
        route = await networks.ask("route")
        assert [(hop["peer"], hop["start"], hop["end"]) for hop in route] == [
            (peer, span.start, span.stop) for peer, span in zip(networks.peers, spans, strict=True)
        ]


async def test_each_network_accepts_its_own_record_and_finds_nothing_of_the_other(
    stock: StockEnvironment, client: Driver, tmp_path: Path
) -> None:
    async with both_networks(stock, client, tmp_path, ALL) as networks:
        (peer,) = networks.peers
        records = await networks.ask("records", uids=[f"{PREFIX}.{block}" for block in ALL])
        for block in ALL:
            (server,) = records[f"{PREFIX}.{block}"].items()
            assert server[0] == peer
            assert (server[1]["state"], server[1]["start"], server[1]["end"]) == ("ONLINE", 0, 8)
        foreign = await networks.ask("records", uids=[f"{TINY.prefix}.{block}" for block in ALL])
        assert not any(foreign.values())
        assert await networks.ask("subkeys", dht_key="_kwaai.inference.nodes") is None
        assert await networks.ask("subkeys", dht_key="_petals.models") == [PREFIX]

        (served,) = await networks.kwaainet.servers()
        assert (served.peer_id, served.blocks) == (peer, ALL)
        assert networks.kwaainet.skipped == []
        assert [node.peer_id for node in await networks.kwaainet.nodes()] == [peer]
        assert list(await networks.kwaainet.models()) == [TINY.prefix]
        assert not any(networks.boot.dht.held.find(key_id(f"{PREFIX}.{block}")) for block in ALL)


async def test_both_networks_see_within_seconds_that_a_daemon_leaves(
    stock: StockEnvironment, client: Driver, tmp_path: Path
) -> None:
    async with both_networks(stock, client, tmp_path, ALL) as networks:
        (daemon,), (peer,) = networks.daemons, networks.peers
        assert await networks.petals_states() == {(peer, "ONLINE")}
        assert len(await networks.kwaainet.servers()) == 1
        daemon.signal(signal.SIGTERM)
        with trio.fail_after(SEEN_SECONDS):
            while await networks.kwaainet.servers():  # noqa: ASYNC110 - nobody tells a DHT's readers
                await trio.sleep(0.05)
            while await networks.petals_states() != {(peer, "OFFLINE")}:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert await trio.to_thread.run_sync(daemon.wait) == 0
