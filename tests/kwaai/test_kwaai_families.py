"""KwaaiNet's first and last spans of models that do more than look up, norm and multiply at their ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trio
from family_models import BLOCKS, save
from kwaai_world import Node, World, peer, round_half

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.server import KwaaiProtocols, serve_kwaai
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcServer

SPANS = (range(1), range(1, BLOCKS))
PROMPT = [1, 17, 44, 5, 60, 33, 8, 2, 9]
NEW_TOKENS = 6


@asynccontextmanager
async def world_of(folder: Path) -> AsyncIterator[World]:
    """Two servers of a model."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        world = World(MemoryNetwork(nursery))
        for number, blocks in enumerate(SPANS, start=1):
            engine = await Engine.load(EngineConfig(str(folder), blocks=blocks, threads=1))
            stack.push_async_callback(engine.aclose)
            host, model = world.network.host(peer(number)), ServedModel(engine)
            server = await stack.enter_async_context(serve_kwaai(host, RpcServer(host), KwaaiProtocols()))
            await stack.enter_async_context(server.serving(model))
            world.nodes.append(Node(host, model, server))
        yield world
        nursery.cancel_scope.cancel()


class Whole:
    """The model in transformers, with what leaves the first span rounded as it travels."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()
        base = getattr(self._model, self._model.base_model_prefix)
        layer = (base.layers if hasattr(base, "layers") else base.h)[SPANS[0].stop - 1]
        layer.register_forward_hook(self._travel)

    @staticmethod
    def _travel(_layer: Any, _args: Any, output: Any) -> Any:
        return (round_half(output[0]), *output[1:]) if isinstance(output, tuple) else round_half(output)

    @torch.no_grad()
    def scores(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "bloom", "falcon-40b"])
async def test_first_and_last_spans_of_other_families(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    save(name, tmp_path)
    whole, ids, given = Whole(tmp_path), list(PROMPT), list(PROMPT)
    async with world_of(tmp_path) as world:
        client = world.client()
        for _ in range(NEW_TOKENS):
            position = len(ids) - len(given)
            hidden = await client.step_ids(world.nodes[0].peer, 7, position, given)
            (scores,) = (await client.step_hidden(world.nodes[1].peer, 7, position, hidden))[0]
            expected = whole.scores(ids)
            assert (scores - expected).abs().max() <= 2**-9 * max(1.0, expected.abs().max().item())
            given = [int(scores.argmax())]
            assert given[0] == int(round_half(expected).argmax())
            ids += given


async def test_ends_that_no_norm_divides_are_refused(tmp_path: Path) -> None:
    """nanochat: its blocks are served to Petals, and those between the ends to KwaaiNet."""
    torch.manual_seed(7)
    config = transformers.NanoChatConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, vocab_size=64
    )
    transformers.NanoChatForCausalLM(config).save_pretrained(tmp_path)
    engine = await Engine.load(EngineConfig(str(tmp_path), threads=1))
    with pytest.raises(
        ConfigError, match=r"\(what follows its last block is not one norm\); serve blocks 1:2"
    ):
        ServedModel(engine)
    engine.blocks = range(1, 2)
    assert ServedModel(engine).ready
    await engine.aclose()
