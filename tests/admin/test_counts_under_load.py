"""What a node counts agrees with what its clients count, of both networks at once, cancelled work among it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import trio
from admin_support import asking, families, sample, until
from node_support import PREFIX, RunningNode, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.hivemind.client import (
    Directory,
    Swarm,
    backward,
    forward,
    open_session,
)
from kwaainet_bridge.hivemind.peer import Peer, open_peer
from kwaainet_bridge.kwaai.client import KwaaiClient

pytestmark = pytest.mark.slow

BLOCKS, HIDDEN, VOCABULARY = 8, 64, 384
PAGE = defaults.PAGE_TOKENS
PEERS, SESSIONS, STEPS = 3, 4, 10
PROMPT = 2 * PAGE + 3


@dataclass
class Tally:
    """What clients of one network have seen: steps that were answered, and those that they gave up."""

    steps: int = 0
    tokens: int = 0
    given_up: int = 0
    tokens_given_up: int = 0
    passes: int = 0
    pass_tokens: int = 0
    refused: int = 0

    def answered(self, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens

    def gave_up(self, tokens: int) -> None:
        self.given_up += 1
        self.tokens_given_up += tokens

    def passed(self, tokens: int) -> None:
        self.passes += 1
        self.pass_tokens += tokens


@dataclass
class World:
    node: RunningNode
    client: httpx.AsyncClient
    socket: Path
    peers: list[Peer]
    petals: Tally = field(default_factory=Tally)
    kwaainet: Tally = field(default_factory=Tally)

    @property
    def tallies(self) -> dict[str, Tally]:
        return {"petals": self.petals, "kwaainet": self.kwaainet}


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(running_node(node_config(folder, "boot")))
        networks = {"petals": {}, "kwaainet": {"bootstrap": [boot.address]}}
        config = node_config(folder, "node", blocks=f"0:{BLOCKS}", networks=networks)
        node = await stack.enter_async_context(running_node(config))
        await node.serving()
        peers = [
            await stack.enter_async_context(open_peer([node.address], client_mode=True)) for _ in range(PEERS)
        ]
        client = await stack.enter_async_context(asking(config.admin_address))
        yield World(node, client, config.admin_address.path, peers)


class Halfway:
    """Where all sessions wait for each other while somebody looks."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self.reached, self.go_on = trio.Event(), trio.Event()

    async def wait(self) -> None:
        self._parties -= 1
        if not self._parties:
            self.reached.set()
        await self.go_on.wait()


def patience(rng: random.Random, *, gives_up: bool) -> float:
    """Seconds until a step is given up: most are not."""
    return rng.uniform(0, 0.03) if gives_up and rng.random() < 0.25 else float("inf")


async def petals_session(world: World, peer: Peer, rng: random.Random, halfway: Halfway | None) -> None:
    """A session of our client, whose prompt others have, too; it ends where it gives up."""
    tally = world.petals
    swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, BLOCKS), rng=rng)
    numbers = torch.Generator().manual_seed(rng.randrange(3))
    lengths = [PROMPT, *(rng.randrange(1, 7) for _ in range(STEPS))]
    async with open_session(swarm, max_length=sum(lengths)) as session:
        for number, tokens in enumerate(lengths):
            if number == STEPS // 2 and halfway is not None:
                await halfway.wait()
            hidden = torch.randn(1, tokens, HIDDEN, generator=numbers)
            with trio.move_on_after(patience(rng, gives_up=halfway is None)) as limit:
                output = await session.step(hidden)
                assert output.shape == hidden.shape
                tally.answered(tokens)
            if limit.cancelled_caught:
                tally.gave_up(tokens)
                break


async def kwaainet_session(
    world: World, peer: Peer, rng: random.Random, halfway: Halfway | None, number: int
) -> None:
    """The same in KwaaiNet, where a session that gave up begins anew with all that it had."""
    tally, client, node = world.kwaainet, KwaaiClient(peer.client), world.node.contact.peer_id
    position = 0
    for step in range(STEPS):
        if step == STEPS // 2 and halfway is not None:
            await halfway.wait()
        tokens = rng.randrange(1, 7)
        ids = [rng.randrange(VOCABULARY) for _ in range(tokens)]
        with trio.move_on_after(patience(rng, gives_up=halfway is None)) as limit:
            scores = await client.step_ids(node, number, position, ids)
            assert scores.shape == (1, 1, VOCABULARY)
            tally.answered(tokens)
            position += tokens
        if limit.cancelled_caught:
            tally.gave_up(tokens)
            position = 0


async def passes(world: World, peer: Peer, rng: random.Random) -> None:
    """Forward and backward in Petals, all of which are waited for."""
    swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, BLOCKS), rng=rng)
    for _ in range(3):
        tokens = rng.randrange(1, 20)
        there = await forward(swarm, torch.randn(1, tokens, HIDDEN))
        world.petals.passed(tokens)
        await backward(swarm, there, torch.randn(1, tokens, HIDDEN))
        world.petals.passed(tokens)


async def refusals(world: World, peer: Peer) -> None:
    """Steps of sessions that there are not."""
    for number in range(2):
        with pytest.raises(HandlerError, match="you have no session"):
            await KwaaiClient(peer.client).step_ids(world.node.contact.peer_id, 9000 + number, 7, [1])
        world.kwaainet.refused += 1


async def first_event(socket: Path) -> Any:
    """What a page is told first."""
    async with await trio.open_unix_socket(str(socket)) as stream:
        await stream.send_all(b"GET /api/events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        data = b""
        while b"\n\n" not in data.partition(b"\r\n\r\n")[2]:
            data += await stream.receive_some()
    event = data.partition(b"\r\n\r\n")[2].partition(b"\n\n")[0]
    name, _, content = event.partition(b"\n")
    assert name == b"event: status"
    return json.loads(content.removeprefix(b"data: "))


async def told(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """The status and the metrics; what a page is told agrees with the former."""
    status = (await world.client.get("/api/status")).json()
    event = await first_event(world.socket)
    assert event["networks"] == status["networks"]
    assert [model["networks"]["petals"]["served"] for model in event["models"]] == [
        model["networks"]["petals"]["served"] for model in status["models"]
    ]
    return status, families((await world.client.get("/metrics")).text)


async def check(world: World, *, sessions: dict[str, int]) -> None:
    status, metrics = await told(world)
    (model,) = status["models"]
    for name, tally in world.tallies.items():
        where = {"model": PREFIX, "network": name}
        served = status["networks"][name]["served"]
        assert model["networks"][name]["served"] == served
        assert tally.steps <= served["steps"] <= tally.steps + tally.given_up
        assert tally.tokens <= served["step_tokens"] <= tally.tokens + tally.tokens_given_up
        assert (served["passes"], served["pass_tokens"]) == (tally.passes, tally.pass_tokens)
        assert served["refused"] == tally.refused
        assert status["networks"][name]["sessions"] == sessions[name]
        assert sample(metrics, "steps", **where) == served["steps"]
        assert sample(metrics, "tokens", **where, kind="step") == served["step_tokens"]
        assert sample(metrics, "tokens", **where, kind="pass") == served["pass_tokens"]
        assert sample(metrics, "passes", **where) == tally.passes
        assert sample(metrics, "requests_refused", **where) == tally.refused
        assert sample(metrics, "sessions", **where) == sessions[name]
        timed = [
            s.value
            for s in metrics["kwaainet_bridge_step_seconds"].samples
            if s.name.endswith("_count") and s.labels == {**where, "phase": "engine"}
        ]
        assert timed == [served["timed_steps"]]
        assert tally.steps <= served["timed_steps"] <= served["steps"]
    total, left = model["cache"]["tokens_total"], model["cache"]["tokens_left"]
    assert sample(metrics, "cache_tokens", model=PREFIX, state="left") == left
    assert sample(metrics, "cache_tokens", model=PREFIX, state="used") == total - left


async def test_clients_of_both_networks_count_the_same(tmp_path: Path) -> None:
    rng = random.Random(20)
    async with world(tmp_path) as w:
        served = w.node.served
        assert served is not None
        engine = served.engine

        async def all_sessions(halfway: Halfway | None) -> None:
            async with trio.open_nursery() as nursery:
                for number, peer in enumerate(w.peers * SESSIONS):
                    nursery.start_soon(petals_session, w, peer, random.Random(rng.random()), halfway)
                    nursery.start_soon(
                        kwaainet_session, w, peer, random.Random(rng.random()), halfway, number
                    )
                async with trio.open_nursery() as others:
                    others.start_soon(passes, w, w.peers[0], random.Random(rng.random()))
                    others.start_soon(refusals, w, w.peers[1])
                if halfway is not None:
                    await halfway.reached.wait()
                    await check(w, sessions=dict.fromkeys(w.tallies, PEERS * SESSIONS))
                    halfway.go_on.set()

        with trio.fail_after(60):
            await all_sessions(Halfway(2 * PEERS * SESSIONS))
        sessions = {"petals": 0, "kwaainet": PEERS * SESSIONS}
        await until(lambda: are_open(w, sessions))
        await check(w, sessions=sessions)
        exact = (await w.client.get("/api/status")).json()["networks"]
        for name, tally in w.tallies.items():
            assert tally.given_up == 0
            assert exact[name]["served"]["steps"] == exact[name]["served"]["timed_steps"] == tally.steps
            assert exact[name]["served"]["step_tokens"] == tally.tokens
        # float32 both ways; half of the passes are backward ones, which come with inputs and gradients
        petals, token_bytes = w.petals, 4 * HIDDEN
        came = token_bytes * (petals.tokens + petals.pass_tokens + petals.pass_tokens // 2)
        assert exact["petals"]["served"]["received_bytes"] == {"NONE": came}
        went = token_bytes * (petals.tokens + petals.pass_tokens)
        assert exact["petals"]["served"]["sent_bytes"] == {"NONE": went}
        assert exact["kwaainet"]["served"]["received_bytes"] == {"NONE": 4 * w.kwaainet.tokens}
        assert exact["kwaainet"]["served"]["sent_bytes"] == {"FLOAT16": 2 * VOCABULARY * w.kwaainet.steps}

        # the same again, of which many are given up while they wait, are computed, or come back
        with trio.fail_after(60):
            await all_sessions(None)
        assert all(tally.given_up > 5 for tally in w.tallies.values())
        # nothing in KwaaiNet ends a session but silence
        in_kwaainet = served.by_network["kwaainet"]._inference.sessions
        await in_kwaainet.close_idle(trio.current_time() + defaults.KWAAI_SESSION_IDLE_SECONDS)
        await until(lambda: are_open(w, dict.fromkeys(sessions, 0)))
        await check(w, sessions=dict.fromkeys(sessions, 0))
        assert engine.cache_bytes_left == engine.cache_bytes_total
        room = engine._room
        assert room.prefixes is not None
        while room.prefixes.evict():
            pass
        assert {room.allocator.free(block) for block in range(BLOCKS)} == {room.budget.pages}
        await w.node.drained()
    assert torch.is_grad_enabled()


async def are_open(world: World, sessions: dict[str, int]) -> bool:
    networks = (await world.client.get("/api/status")).json()["networks"]
    return all(networks[name]["sessions"] == count for name, count in sessions.items())
