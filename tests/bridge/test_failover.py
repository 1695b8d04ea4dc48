"""Text that goes on, unchanged, while servers of both networks are killed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio
from failover_world import chain_of, peers_in, tokens_of, world
from node_support import TINY as MODEL

from kwaainet_bridge.engine import ClientModel, load_client_weights
from kwaainet_bridge.hivemind.client import InferenceSession

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights() -> ClientModel:
    return load_client_weights(str(MODEL), dtype=torch.float32)


async def test_a_server_killed_every_twenty_tokens_changes_nothing(
    weights: ClientModel, record_property: Callable[[str, Any], None]
) -> None:
    """Three servers in two networks, one of them new whenever one has died."""
    async with world() as networks, networks.client() as swarm:
        await networks.add_petals(rps=50.0)
        undisturbed = await tokens_of(swarm, weights, 200)
        await networks.add_kwaai()
        await networks.add_kwaai()
        used: list[str] = []
        pauses: list[float] = []
        last = trio.current_time()

        async def kill_in_turn(done: int, session: InferenceSession) -> None:
            nonlocal last
            pauses.append(trio.current_time() - last)
            if done % 20 == 0:
                (victim,) = peers_in(session)
                ((network, _, _),) = chain_of(session)
                used.append(network)
                await networks.kill(victim)
                await (networks.add_petals(rps=50.0) if network == "petals" else networks.add_kwaai())
            last = trio.current_time()

        tokens = await tokens_of(swarm, weights, 200, at=kill_in_turn)
        assert tokens == undisturbed
        assert len(used) == 10
        assert set(used) == {"petals", "kwaainet"}
        worst = sorted(pauses[1:])
        record_property("worst_pause_seconds", worst[-1])
        print(f"pauses: median {worst[100] * 1000:.0f} ms, p99 {worst[-3]:.2f} s, worst {worst[-1]:.2f} s")
