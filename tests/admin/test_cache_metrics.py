"""Common beginnings, sessions on the host and adapters, as a node's metrics and status tell of them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import trio
from adapter_files import make_adapter
from admin_support import asking, check_documented, families, sample, until
from node_support import PREFIX, TINY, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.client import Directory, Swarm, open_session
from kwaainet_bridge.hivemind.peer import open_peer

PAGE = defaults.PAGE_TOKENS
BLOCKS, HIDDEN = 8, 64


async def test_a_node_tells_of_what_its_sessions_share_and_of_those_on_the_host(tmp_path: Path) -> None:
    adapter = await trio.to_thread.run_sync(make_adapter, tmp_path / "french", TINY)
    config = node_config(tmp_path, "node", blocks=f"0:{BLOCKS}")
    more = {"adapters": (str(adapter),), "offload_idle_seconds": 0.1, "cache_tokens": 32 * PAGE}
    config = config.model_copy(update={"model": config.model.model_copy(update=more)})
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(running_node(config))
        client = await stack.enter_async_context(asking(config.admin_address))
        await node.serving()
        peer = await stack.enter_async_context(open_peer([node.address], client_mode=True))
        swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, BLOCKS))

        async def told() -> tuple[dict[str, Any], dict[str, Any]]:
            status = (await client.get("/api/status")).json()
            check_documented(status)
            (model,) = status["models"]
            return model, families((await client.get("/metrics")).text)

        model, found = await told()
        assert model["prefixes"] == {"found_tokens": 0, "computed_tokens": 0, "kept_bytes": 0}
        assert (
            model["offload"]["sessions"] == sample(found, "offload_moves", model=PREFIX, direction="out") == 0
        )
        assert sample(found, "adapters", model=PREFIX) == 1

        prompt = torch.randn(1, 2 * PAGE + 1, HIDDEN)
        for _ in range(3):
            async with open_session(swarm, max_length=4 * PAGE) as session:
                await session.step(prompt)
        model, found = await told()
        (kept,) = {model["prefixes"]["kept_bytes"]}
        assert kept > 0
        assert model["prefixes"] == {
            "found_tokens": 4 * PAGE,
            "computed_tokens": 2 * PAGE,
            "kept_bytes": kept,
        }
        assert sample(found, "prefix_tokens", model=PREFIX, outcome="found") == 4 * PAGE
        assert sample(found, "prefix_tokens", model=PREFIX, outcome="computed") == 2 * PAGE
        assert sample(found, "prefix_bytes", model=PREFIX) == kept

        async with open_session(swarm, max_length=5 * PAGE) as idle:
            await idle.step(torch.randn(1, PAGE, HIDDEN))
            await trio.sleep(0.2)
            async with open_session(swarm, max_length=31 * PAGE) as session:
                await session.step(torch.randn(1, 30 * PAGE, HIDDEN))
                model, found = await told()
                on_the_host = model["offload"]
                assert (on_the_host["sessions"], on_the_host["tokens"]) == (1, PAGE)
                assert on_the_host["moves"] == {"out": 1, "back": 0}
                assert on_the_host["moved_bytes"] == {"out": on_the_host["bytes"], "back": 0}
                assert on_the_host["bytes"] > 0
                where = {"model": PREFIX}
                assert sample(found, "offloaded_sessions", **where) == 1
                assert sample(found, "offloaded_tokens", **where) == PAGE
                assert sample(found, "offloaded_bytes", **where) == on_the_host["bytes"]
                assert sample(found, "offload_moves", **where, direction="out") == 1
            moved = on_the_host["bytes"]
            await idle.step(torch.randn(1, 1, HIDDEN))
            model, found = await told()
            assert model["offload"] == {
                "sessions": 0,
                "tokens": 0,
                "bytes": 0,
                "moves": {"out": 1, "back": 1},
                "moved_bytes": {"out": moved, "back": moved},
            }
            assert sample(found, "offload_moved_bytes", **where, direction="back") == moved
            assert sample(found, "offloaded_sessions", **where) == 0

        async def all_is_free() -> bool:
            cache = (await told())[0]["cache"]
            return bool(cache["tokens_left"] == cache["tokens_total"])

        await until(all_is_free)


async def test_nothing_is_told_where_neither_is_on(tmp_path: Path) -> None:
    config = node_config(tmp_path, "node", blocks="0:1")
    config = config.model_copy(update={"model": config.model.model_copy(update={"share_prefixes": "off"})})
    async with running_node(config) as node, asking(config.admin_address) as client:
        await node.serving()
        (model,) = (await client.get("/api/status")).json()["models"]
        assert (model["prefixes"], model["offload"]) == (None, None)
        found = families((await client.get("/metrics")).text)
        for name in ("prefix_tokens", "prefix_bytes", "offloaded_sessions", "offload_moves"):
            assert found[f"kwaainet_bridge_{name}"].samples == []
        assert sample(found, "adapters", model=PREFIX) == 0
