"""One node, one model in memory, both networks: their clients at the same time, their records, the way out."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from node_support import PREFIX, TINY, RunningNode, node_config, running_node
from simulator import TINY as SIMULATED_TINY
from simulator import NoChain, generate_locally, key_id, simulated_bootstrap, simulated_client

from kwaainet_bridge.engine import load_client_weights
from kwaainet_bridge.hivemind.client import Directory, Swarm, generate, open_session
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.peer import open_peer

pytestmark = pytest.mark.slow

PROMPT = [1, 42, 99, 7, 300]
TOKENS = 20
BLOCKS = 8


async def start(
    stack: AsyncExitStack, folder: Path, boot: Any, name: str = "both", **more: Any
) -> RunningNode:
    """A node with one model in both networks; ``boot`` is KwaaiNet's bootstrap peer."""
    networks = {"petals": {}, "kwaainet": {"bootstrap": [boot.address], "dht_prefix": SIMULATED_TINY.prefix}}
    config = node_config(
        folder, name, blocks=more.pop("blocks", f"0:{BLOCKS}"), **{"networks": networks} | more
    )
    node = await stack.enter_async_context(running_node(config))
    await node.serving()
    return node


async def petals_tokens(node: RunningNode) -> list[int]:
    weights = await trio.to_thread.run_sync(load_client_weights, str(TINY))
    async with open_peer([node.address], client_mode=True) as peer:
        swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, BLOCKS))
        async with open_session(swarm, max_length=len(PROMPT) + TOKENS) as session:
            steps = generate(weights, session, torch.tensor([PROMPT]), max_new_tokens=TOKENS)
            return [step[0] async for step in steps]


async def test_clients_of_both_networks_generate_at_the_same_time(tmp_path: Path) -> None:
    """KwaaiNet's get what one local model gives with logits rounded to float16, Petals' what it gives."""
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        node = await start(stack, tmp_path, boot)
        client = await stack.enter_async_context(simulated_client(bootstrap=[boot]))
        results: dict[str, list[int]] = {}

        async def by_kwaainet() -> None:
            results["kwaainet"] = await client.generate(PROMPT, TOKENS)

        async def by_petals() -> None:
            results["petals"] = await petals_tokens(node)

        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(by_kwaainet)
                nursery.start_soon(by_petals)
        expected = generate_locally(SIMULATED_TINY, PROMPT, TOKENS, boundaries=[])
        assert results == {"kwaainet": expected, "petals": expected}
        assert boot.complaints == client.complaints == []
        await node.drained()


async def test_each_network_reads_its_own_records_and_both_see_the_drain(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        node = await start(stack, tmp_path, boot)
        client = await stack.enter_async_context(simulated_client(bootstrap=[boot]))
        reader = await stack.enter_async_context(open_peer([node.address], listen=["/ip4/127.0.0.1/tcp/0"]))
        directory = Directory(reader.dht, PREFIX, BLOCKS)

        (served,) = await client.servers()
        assert served.peer_id == str(node.contact.peer_id)
        (span,) = await directory.read()
        assert span.blocks == range(BLOCKS)
        # neither network holds anything of the other
        assert not boot.dht.held.find(key_id(f"{PREFIX}.0"))
        assert await reader.dht.get(f"{SIMULATED_TINY.prefix}.0") is None

        node.stop.set()
        with trio.fail_after(5):
            while await client.servers() or await directory.read():  # noqa: ASYNC110 - nobody tells a DHT's readers
                await trio.sleep(0.1)
        (offline,) = await directory.read(states=list(ServerState))
        assert offline.info.state is ServerState.OFFLINE
        await node.drained()


@pytest.mark.parametrize(
    ("switched_off", "in_petals", "in_kwaainet"), [("petals_inference", 0, 1), ("kwaai_inference", 1, 0)]
)
async def test_no_network_lists_what_it_cannot_use(
    tmp_path: Path, switched_off: str, in_petals: int, in_kwaainet: int
) -> None:
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        node = await start(stack, tmp_path, boot, protocols={switched_off: False})
        client = await stack.enter_async_context(simulated_client(bootstrap=[boot]))
        reader = await stack.enter_async_context(open_peer([node.address], client_mode=True))
        assert len(await Directory(reader.dht, PREFIX, BLOCKS).read()) == in_petals
        if in_kwaainet:
            assert len(await client.servers()) == in_kwaainet
        else:
            with pytest.raises(NoChain, match="not announced"):
                await client.servers()
            assert not boot.dht.held.log
        await node.drained()


async def test_a_node_of_kwaainet_alone_serves_and_has_no_petals_side(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        networks = {
            "petals": None,
            "kwaainet": {"bootstrap": [boot.address], "dht_prefix": SIMULATED_TINY.prefix},
        }
        node = await start(stack, tmp_path, boot, networks=networks)
        client = await stack.enter_async_context(simulated_client(bootstrap=[boot]))
        expected = generate_locally(SIMULATED_TINY, PROMPT, TOKENS, boundaries=[])
        assert await client.generate(PROMPT, TOKENS) == expected
        assert await client.hello(str(node.contact.peer_id)) == "ok"
        await node.drained()
