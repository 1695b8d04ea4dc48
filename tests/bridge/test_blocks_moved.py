"""A node in both networks moves to the blocks that they lack together, without memory for two spans."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from node_support import PREFIX, TINY, RunningNode, node_config, running_node
from simulator import TINY as SIMULATED_TINY
from simulator import generate_locally, simulated_bootstrap, simulated_client, simulated_server
from structlog.testing import capture_logs

from kwaainet_bridge.hivemind.client import Directory
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.node import memory

pytestmark = pytest.mark.slow

PROMPT, TOKENS = [1, 42, 99, 7, 300], 12


async def serving(node: RunningNode, blocks: range) -> None:
    with trio.fail_after(60):
        while node.served is None or node.served.engine.blocks != blocks:
            await node.state.wait_changed()


async def test_it_leaves_blocks_to_kwaainet_and_both_networks_see_where_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_ram", lambda: None)
    with trio.fail_after(120):
        async with simulated_bootstrap() as boot, simulated_client(bootstrap=[boot]) as client:
            networks = {
                "petals": {},
                "kwaainet": {"bootstrap": [boot.address], "dht_prefix": SIMULATED_TINY.prefix},
            }
            served = {
                "name": str(TINY),
                "dht_prefix": PREFIX,
                "blocks": "auto",
                "num_blocks": 4,
                "throughput": 1.0,
                "threads": 1,
                "cache_tokens": 1024,
                "rebalance_seconds": 0.3,
            }
            with capture_logs() as logs:
                async with running_node(
                    node_config(tmp_path, "both", networks=networks, model=served, drain_seconds=1)
                ) as node:
                    await serving(node, range(4))
                    own = str(node.contact.peer_id)
                    # leases are asked for before the move, so that the places have seen a drain
                    await client.lease(own)
                    async with simulated_server(blocks=range(4), bootstrap=[boot]) as other:
                        await serving(node, range(4, 8))
                        found = {server.peer_id for server in await client.servers()}
                        assert found == {own, other.peer_id}
                        expected = generate_locally(SIMULATED_TINY, PROMPT, TOKENS, boundaries=[4])
                        assert await client.generate(PROMPT, TOKENS) == expected
                        assert other.complaints == []
                        async with open_peer([node.address], client_mode=True) as reader:
                            directory = Directory(reader.dht, PREFIX, 8)
                            (span,) = await directory.read(states=list(ServerState))
                            assert (str(span.peer), span.blocks) == (own, range(4, 8))
                            assert span.info.state is ServerState.ONLINE
                        assert not node.state.degraded
                        await node.drained()
            phases = [entry["event"] for entry in logs if entry.get("event_kind") == "phase"]
            assert phases[2:] == [
                "serving",
                "draining",
                "loading",
                "serving",
                "draining",
                "stopped",
            ]
            assert boot.complaints == client.complaints == []
