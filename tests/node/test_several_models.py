"""Whole nodes with several models: both are used at once, and what happens to one is not felt with the other."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trio
from node_support import TINY, RunningNode, node_config, running_node

from kwaainet_bridge.config import EMBEDDED_MODEL, ModelConfig
from kwaainet_bridge.engine import ClientModel, load_client_weights
from kwaainet_bridge.hivemind.client import Directory, Swarm, generate, open_session
from kwaainet_bridge.hivemind.experts.records import MODEL_REGISTRY_KEY, ServerState
from kwaainet_bridge.hivemind.peer import Peer, open_peer
from kwaainet_bridge.node.admin.metrics import exposition
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.models import model_source
from kwaainet_bridge.node.readiness import conditions
from kwaainet_bridge.node.state import Phase

pytestmark = pytest.mark.slow

BLOCKS, TOKENS = 8, 12
PROMPT = [1, 42, 99, 7, 300]
AUSTEN = {"name": EMBEDDED_MODEL, "dht_prefix": "austen-hf"}
LLAMA = {"name": str(TINY), "dht_prefix": "tiny-llama-hf"}


def entry(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**model, "dtype": "float32", "throughput": 1.0, "threads": 1, "cache_tokens": 1024, **more}


def source(model: dict[str, Any]) -> str:
    return model_source(model["name"])


def generated_here(model: dict[str, Any]) -> list[int]:
    transformers.utils.logging.disable_progress_bar()
    whole = transformers.AutoModelForCausalLM.from_pretrained(source(model), dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        ids = whole.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
    tokens: list[int] = ids[0, len(PROMPT) :].tolist()
    return tokens


async def tokens_of(peer: Peer, model: dict[str, Any], weights: ClientModel) -> AsyncIterator[int]:
    swarm = Swarm(peer.client, Directory(peer.dht, model["dht_prefix"], BLOCKS))
    async with open_session(swarm, max_length=len(PROMPT) + TOKENS) as session:
        async for (token,) in generate(weights, session, torch.tensor([PROMPT]), max_new_tokens=TOKENS):
            yield token


async def weights_of(model: dict[str, Any]) -> ClientModel:
    return await trio.to_thread.run_sync(load_client_weights, source(model))


async def served(node: RunningNode, key: str) -> None:
    with trio.fail_after(60):
        await node.state.models[key].wait_for(Phase.SERVING)


@asynccontextmanager
async def node_and_client(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[RunningNode, Peer]]:
    async with (
        running_node(node_config(tmp_path, "node", **settings)) as node,
        open_peer([node.address], client_mode=True) as peer,
    ):
        yield node, peer


async def test_two_models_are_generated_with_at_once(tmp_path: Path) -> None:
    found: dict[str, list[int]] = {}
    async with node_and_client(tmp_path, models=[entry(AUSTEN), entry(LLAMA)]) as (node, peer):
        for model in (AUSTEN, LLAMA):
            await served(node, model["dht_prefix"])

        async def use(model: dict[str, Any]) -> None:
            weights = await weights_of(model)
            found[model["name"]] = [token async for token in tokens_of(peer, model, weights)]

        async with trio.open_nursery() as nursery:
            for model in (AUSTEN, LLAMA):
                nursery.start_soon(use, model)

        registered = await peer.dht.get(MODEL_REGISTRY_KEY)
        assert registered is not None
        assert set(registered.value) == {"austen-hf", "tiny-llama-hf"}
        status = status_of(node.state)
        assert [(m["name"], m["blocks"]["end"], m["phase"]["name"]) for m in status["models"]] == [
            ("austen-hf", 8, "serving"),
            ("tiny-llama-hf", 8, "serving"),
        ]
        each = [m["networks"]["petals"] for m in status["models"]]
        assert [one["prefix"] for one in each] == ["austen-hf", "tiny-llama-hf"]
        assert [one["served"]["steps"] for one in each] == [TOKENS, TOKENS]
        assert status["networks"]["petals"]["served"]["steps"] == 2 * TOKENS
        assert status["ready"]
        told = exposition(node.state).decode()
        for model in (AUSTEN, LLAMA):
            labels = f'model="{model["dht_prefix"]}",network="petals"'
            assert f"kwaainet_bridge_steps_total{{{labels}}} {float(TOKENS)}" in told
        await node.drained()
    for model in (AUSTEN, LLAMA):
        assert found[model["name"]] == await trio.to_thread.run_sync(generated_here, model)


def broken_copy(folder: Path) -> Path:
    """A checkpoint whose description is whole and whose weights are not."""
    copy = folder / "broken"
    shutil.copytree(TINY, copy)
    for file in copy.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:2000])
    return copy


async def test_a_generation_goes_on_while_another_model_fails_loads_and_goes(tmp_path: Path) -> None:
    broken = {"name": str(broken_copy(tmp_path)), "dht_prefix": "broken-hf"}
    weights = await weights_of(AUSTEN)
    async with node_and_client(tmp_path, model=entry(AUSTEN)) as (node, peer):
        await served(node, "austen-hf")
        tokens = tokens_of(peer, AUSTEN, weights)
        found = [await anext(tokens), await anext(tokens)]

        state = node.models.add(ModelConfig(**entry(broken)))
        found.append(await anext(tokens))
        with trio.fail_after(60):
            while not state.degraded:
                await state.wait_changed()
        found.append(await anext(tokens))
        assert node.state.phase is Phase.SERVING
        unmet = {(c.name, c.model): c.reason for c in conditions(node.state) if not c.met}
        assert "tried again every 30 s" in unmet["blocks", "broken-hf"]
        assert ("blocks", "austen-hf") not in unmet
        await node.models.remove("broken-hf")
        found.append(await anext(tokens))

        node.models.add(ModelConfig(**entry(LLAMA)))
        found.append(await anext(tokens))
        await served(node, "tiny-llama-hf")
        found.append(await anext(tokens))
        other = [token async for token in tokens_of(peer, LLAMA, await weights_of(LLAMA))]
        blocks = node.state.models["tiny-llama-hf"].served
        assert blocks is not None
        engine = weakref.ref(blocks.engine)
        del blocks
        with trio.fail_after(30):
            await node.models.remove("tiny-llama-hf")
        gc.collect()
        assert engine() is None  # nothing keeps its weights
        spans = await Directory(peer.dht, "tiny-llama-hf", BLOCKS).read(states=tuple(ServerState))
        assert {span.info.state for span in spans} <= {ServerState.OFFLINE}
        assert set(node.state.models) == {"austen-hf"}
        found += [token async for token in tokens]
        await node.drained()
    assert found == await trio.to_thread.run_sync(generated_here, AUSTEN)
    assert other == await trio.to_thread.run_sync(generated_here, LLAMA)


async def test_one_of_a_configuration_that_cannot_be_loaded(tmp_path: Path) -> None:
    models = [entry(AUSTEN), entry({"name": str(broken_copy(tmp_path)), "dht_prefix": "broken-hf"})]
    async with running_node(node_config(tmp_path, "node", models=models)) as node:
        await served(node, "austen-hf")
        broken = node.state.models["broken-hf"]
        with trio.fail_after(30):
            while not broken.degraded:
                await broken.wait_changed()
        assert not node.state.models["austen-hf"].degraded
        assert node.state.phase is Phase.SERVING
        await node.drained()
