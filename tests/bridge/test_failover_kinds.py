"""Chains of both networks, and every way in which one of their servers fails in the middle of a text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
import trio
from failover_world import PROMPT, World, chain_of, peers_in, tokens_of, world
from node_support import TINY as MODEL
from simulator import INFERENCE, LEASE, TINY, SimulatedServer, generate_locally

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.kwaai_servers import KWAAINET
from kwaainet_bridge.engine import ClientModel, load_client_weights
from kwaainet_bridge.errors import NoRoute
from kwaainet_bridge.hivemind.client import InferenceSession, Swarm
from kwaainet_bridge.hivemind.client.directory import PETALS

pytestmark = pytest.mark.slow

TOKENS = 24
MIDDLE = 10
"""Tokens that are there when a server fails."""
FIRST, LAST, ALL = range(4), range(4, 8), range(8)
STEP_SECONDS = 3.0
"""The patience of these tests: a step takes milliseconds here."""


@pytest.fixture(scope="module")
def weights() -> ClientModel:
    return load_client_weights(str(MODEL), dtype=torch.float32)


@pytest.fixture(scope="module")
def undisturbed() -> list[int]:
    """What the whole model says. Rounding to float16 between the servers makes no difference to these tokens."""
    tokens = generate_locally(TINY, PROMPT, TOKENS, boundaries=[])
    assert tokens == generate_locally(TINY, PROMPT, TOKENS, boundaries=[4])
    return tokens


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts of a millisecond in place of a second."""
    monkeypatch.setattr(defaults, "RETRY_MIN_SECONDS", 0.001)


def is_blamed(swarm: Swarm, peer: str, network: str = KWAAINET) -> bool:
    """Whether a failure is held against a peer in one network."""
    return (peer, network) in {(str(who), where) for who, where in swarm._bans._failures}


async def text_through(
    swarm: Swarm, weights: ClientModel, disturb: Callable[[], Awaitable[Any]] | None = None
) -> tuple[list[int], list[list[tuple[str, int, int]]], list[str]]:
    """The tokens, the chain in use when ``disturb`` is called and the last one, and the peers of the last."""
    chains: list[list[tuple[str, int, int]]] = []
    peers: list[str] = []

    async def at(done: int, session: InferenceSession) -> None:
        if done == MIDDLE:
            chains.append(chain_of(session))
            if disturb is not None:
                await disturb()
        if done == TOKENS:
            chains.append(chain_of(session))
            peers.extend(peers_in(session))

    with trio.fail_after(120):
        tokens = await tokens_of(swarm, weights, TOKENS, at=at)
    return tokens, chains, peers


async def add(networks: World, network: str, blocks: range, **options: Any) -> str:
    if network == PETALS:
        return await networks.add_petals(blocks, **options)
    return (await networks.add_kwaai(blocks, **options)).peer_id


@pytest.mark.parametrize(("first", "last"), [(PETALS, KWAAINET), (KWAAINET, PETALS), (KWAAINET, KWAAINET)])
async def test_a_chain_over_both_networks_says_the_same(
    first: str, last: str, weights: ClientModel, undisturbed: list[int]
) -> None:
    async with world() as networks, networks.client() as swarm:
        await add(networks, first, FIRST)
        await add(networks, last, LAST)
        tokens, (_, chain), _ = await text_through(swarm, weights)
        assert tokens == undisturbed
        assert chain == [(first, 0, 4), (last, 4, 8)]


# --- a server of KwaaiNet fails --------------------------------------------------------------------------------


def _set(**faults: Any) -> Callable[[World, SimulatedServer], Awaitable[None]]:
    async def disturb(_networks: World, server: SimulatedServer) -> None:
        for name, value in faults.items():
            setattr(server.faults, name, value)

    return disturb


async def _refuse(_networks: World, server: SimulatedServer) -> None:
    server.refuse(INFERENCE)


async def _kill(networks: World, server: SimulatedServer) -> None:
    await networks.kill(server.peer_id)


async def _die_in_an_answer(_networks: World, server: SimulatedServer) -> None:
    server.faults.dies_after = server.answers + 1


async def _warm_up(_networks: World, server: SimulatedServer) -> None:
    server.warming_up = True


FAILURES: dict[str, Callable[[World, SimulatedServer], Awaitable[None]]] = {
    "refuses the protocol": _refuse,
    "never answers": _set(silent=True),
    "is killed": _kill,
    "dies in the middle of an answer": _die_in_an_answer,
    "answers another shape": _set(wrong_shape=True),
    "answers too little data": _set(short_data=True),
    "answers what is no number": _set(nan=True),
    "answers an error": _set(error="CUDA out of memory"),
    "warms up": _warm_up,
}


@pytest.mark.parametrize("failing", [FIRST, LAST], ids=["first blocks", "last blocks"])
@pytest.mark.parametrize("failure", FAILURES)
async def test_petals_takes_over_from_a_server_of_kwaainet(
    failure: str, failing: range, weights: ClientModel, undisturbed: list[int]
) -> None:
    other = LAST if failing == FIRST else FIRST
    async with world() as networks, networks.client(step_seconds=STEP_SECONDS) as swarm:
        server = await networks.add_kwaai(failing)
        await networks.add_petals(other)

        async def disturb() -> None:
            await networks.add_petals(failing)
            await FAILURES[failure](networks, server)

        tokens, (before, after), _ = await text_through(swarm, weights, disturb)
        assert tokens == undisturbed
        assert (KWAAINET, failing.start, failing.stop) in before
        assert after == [(PETALS, 0, 4), (PETALS, 4, 8)]
        assert is_blamed(swarm, server.peer_id) == (failure != "warms up")


async def test_a_server_that_forgot_its_sessions_goes_on(
    weights: ClientModel, undisturbed: list[int]
) -> None:
    """As it does when it was started anew, or has had too many of them; nobody else is there."""
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_kwaai()

        async def forget() -> None:
            server.span.sessions.clear()

        tokens, (before, after), _ = await text_through(swarm, weights, forget)
        assert tokens == undisturbed
        assert before == after == [(KWAAINET, 0, 8)]
        assert len({request.session_id for _, request in server.requests}) == 2
        assert not server.complaints


# --- a server of Petals fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [FIRST, LAST], ids=["first blocks", "last blocks"])
@pytest.mark.parametrize("failure", ["is killed", "refuses"])
async def test_kwaainet_takes_over_from_a_server_of_petals(
    failure: str, failing: range, weights: ClientModel, undisturbed: list[int]
) -> None:
    other = LAST if failing == FIRST else FIRST
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_ours(failing, kwaainet=False)
        await networks.add_petals(other)

        async def disturb() -> None:
            await networks.add_kwaai(failing)
            await (networks.kill(server.peer_id) if failure == "is killed" else server.refuse_petals())

        tokens, (before, after), _ = await text_through(swarm, weights, disturb)
        assert tokens == undisturbed
        assert before == [(PETALS, 0, 4), (PETALS, 4, 8)]
        assert (KWAAINET, failing.start, failing.stop) in after
        assert is_blamed(swarm, server.peer_id, PETALS)


@pytest.mark.parametrize("failing", [FIRST, LAST], ids=["first blocks", "last blocks"])
@pytest.mark.parametrize("network", [PETALS, KWAAINET])
async def test_a_server_of_all_blocks_takes_over_what_nobody_can_do_in_part(
    network: str, failing: range, weights: ClientModel, undisturbed: list[int]
) -> None:
    """KwaaiNet's run all of their blocks or none, so the session begins anew there, with all its tokens."""
    other = LAST if failing == FIRST else FIRST
    async with world() as networks, networks.client() as swarm:
        failed = await add(networks, network, failing)
        await networks.add_petals(other)

        async def disturb() -> None:
            await networks.add_kwaai(ALL)
            await networks.kill(failed)

        tokens, (before, after), _ = await text_through(swarm, weights, disturb)
        assert tokens == undisturbed
        assert len(before) == 2
        assert after == [(KWAAINET, 0, 8)]


# --- one peer in both networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("fails_in", "goes_on_in"), [(KWAAINET, PETALS), (PETALS, KWAAINET)])
async def test_a_peer_that_fails_in_one_network_is_used_in_the_other(
    fails_in: str, goes_on_in: str, weights: ClientModel, undisturbed: list[int]
) -> None:
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_ours(overall=1000.0 if fails_in == KWAAINET else 1.0)
        disturb = server.refuse_kwaainet if fails_in == KWAAINET else server.refuse_petals
        tokens, (before, after), peers = await text_through(swarm, weights, disturb)
        assert tokens == undisturbed
        assert (before, after) == ([(fails_in, 0, 8)], [(goes_on_in, 0, 8)])
        assert peers == [server.peer_id]
        assert is_blamed(swarm, server.peer_id, fails_in)
        assert not is_blamed(swarm, server.peer_id, goes_on_in)


# --- no place, no server ---------------------------------------------------------------------------------------


async def test_a_server_at_capacity_is_not_blamed_and_is_asked_again_when_it_said(
    weights: ClientModel, undisturbed: list[int]
) -> None:
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_kwaai(throughput=1000.0)
        server.faults.at_capacity = True
        await networks.add_petals()
        tokens, (_, chain), _ = await text_through(swarm, weights)
        assert tokens == undisturbed
        assert chain == [(PETALS, 0, 8)]
        assert not is_blamed(swarm, server.peer_id)
        assert not server.requests

        server.faults.at_capacity = False
        passed = 0.0
        clock = swarm._clock
        swarm._clock = lambda: clock() + passed
        _, (_, chain), _ = await text_through(swarm, weights)
        assert chain == [(PETALS, 0, 8)]  # it said 5 s, which are not over
        passed = 5.0
        tokens, (_, chain), _ = await text_through(swarm, weights)
        assert tokens == undisturbed
        assert chain == [(KWAAINET, 0, 8)]


async def test_the_only_server_is_asked_until_it_has_a_place(
    weights: ClientModel, undisturbed: list[int], hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_kwaai()
        server.faults.at_capacity = True
        asked = 0
        grant = server._grant

        def count(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            server.faults.at_capacity = asked < 4
            return grant(*arguments)

        monkeypatch.setattr(server, "_grant", count)
        tokens, (_, chain), _ = await text_through(swarm, weights)
        assert tokens == undisturbed
        assert chain == [(KWAAINET, 0, 8)]
        assert asked == 4


async def test_a_server_that_announces_leases_and_has_none_is_used(
    weights: ClientModel, undisturbed: list[int]
) -> None:
    async with world() as networks, networks.client() as swarm:
        server = await networks.add_kwaai(refuses=[LEASE])
        tokens, (_, chain), _ = await text_through(swarm, weights)
        assert tokens == undisturbed
        assert chain == [(KWAAINET, 0, 8)]
        assert not is_blamed(swarm, server.peer_id)


@pytest.mark.parametrize("network", [PETALS, KWAAINET])
async def test_without_another_server_the_error_names_the_blocks(
    network: str, weights: ClientModel, hasty: None
) -> None:
    async with world() as networks, networks.client() as swarm:
        await networks.add_petals(FIRST)
        failed = await add(networks, network, LAST)

        async def disturb() -> None:
            await networks.kill(failed)

        with pytest.raises(NoRoute, match=r"gave up on blocks 4:8 after 8 attempts") as caught:
            await text_through(swarm, weights, disturb)
        assert caught.value.blocks == tuple(LAST)


async def test_blocks_that_no_network_has_are_named_at_once(weights: ClientModel) -> None:
    async with world() as networks, networks.client() as swarm:
        await networks.add_petals(range(2))
        await networks.add_kwaai(LAST)
        with pytest.raises(NoRoute, match=r"no server is online for blocks 2:4"):
            await text_through(swarm, weights)
