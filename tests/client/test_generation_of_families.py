"""Text of every family through two nodes that have a part of its blocks each, against transformers' own generation."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trio
from client_fakes import PREFIX, FakeDht, peer
from family_models import BLOCKS, CONFIGS, save

from kwaainet_bridge.engine import Engine, EngineConfig, load_client_weights
from kwaainet_bridge.hivemind.client import Directory, Swarm, generate, open_session
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.hivemind.experts.server import serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer

SPANS = (range(2), range(2, BLOCKS))
PROMPT = torch.tensor([[1, 17, 44, 5, 60, 33, 8, 2, 9], [3, 3, 51, 40, 22, 7, 19, 62, 11]])
NEW_TOKENS = 10
TOLERANCE = 2e-5
ENDS_OF_ANOTHER = {"llama-biases", "llama-yarn", "mistral-narrow", "qwen2-window", "phi3-longrope"}
"""Models that differ from another of their family in their blocks only."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[Swarm]:
    """A client's view of two servers of a model."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        network, records = MemoryNetwork(nursery), FakeDht()
        for number, blocks in enumerate(SPANS, start=1):
            engine = await Engine.load(EngineConfig(str(folder), blocks=blocks, threads=1))
            stack.push_async_callback(engine.aclose)
            assert engine.model.no_ends is None
            host = network.host(peer(number))
            served = ServedSpan(PREFIX, engine)
            await stack.enter_async_context(serve_span(served, RpcServer(host), RpcClient(host)))
            info = ServerInfo(ServerState.ONLINE, 1.0, start_block=blocks.start, end_block=blocks.stop)
            records.announce(host.peer_id, info, blocks)
        client = RpcClient(network.host(peer(0)))
        yield Swarm(client, Directory(records, PREFIX, BLOCKS), rng=random.Random(1))
        nursery.cancel_scope.cancel()


class Noting:
    """The client's part of a model, and the scores that it gives."""

    def __init__(self, folder: Path) -> None:
        self._weights = load_client_weights(str(folder))
        self.scores: list[torch.Tensor] = []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weights.embed(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scores.append(self._weights.logits(hidden))
        return self.scores[-1]


def of_the_whole_model(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, new] and logits [new, B, V] of greedy generation in transformers."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    output = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, PROMPT.shape[1] :], torch.stack(output.logits)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ENDS_OF_ANOTHER])
async def test_greedy_text_through_two_nodes_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    weights = Noting(tmp_path)
    async with two_nodes(tmp_path) as swarm:
        length = PROMPT.shape[1] + NEW_TOKENS
        async with open_session(swarm, batch_size=len(PROMPT), max_length=length) as session:
            steps = [step async for step in generate(weights, session, PROMPT, max_new_tokens=NEW_TOKENS)]
            route = session.routes[0][1]
    expected, logits = of_the_whole_model(tmp_path)
    assert len(route) == 2
    assert torch.tensor(steps).T.tolist() == expected.tolist()
    largest = max(1.0, logits.abs().max().item())
    torch.testing.assert_close(torch.stack(weights.scores), logits, rtol=0, atol=TOLERANCE * largest)
