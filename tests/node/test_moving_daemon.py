"""Whole nodes: one that chose its blocks moves to those that nobody has, and what clients see of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trio
from node_support import RunningNode, node_config, running_node

from kwaainet_bridge.config import EMBEDDED_MODEL
from kwaainet_bridge.engine import Engine, EngineConfig, load_client_weights
from kwaainet_bridge.hivemind.client import Directory, Swarm, generate, open_session
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import block_uid
from kwaainet_bridge.hivemind.peer import Peer, open_peer
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.models import model_source
from kwaainet_bridge.node.state import Phase
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor

pytestmark = pytest.mark.slow

PREFIX = "austen-hf"
BLOCKS, HALF = 8, 4
PROMPT = [1, 42, 99, 7, 300]
TOKENS = 16


def model(**more: Any) -> dict[str, Any]:
    return {
        "name": EMBEDDED_MODEL,
        "dht_prefix": PREFIX,
        "dtype": "float32",
        "throughput": 1.0,
        "threads": 1,
        "cache_tokens": 1024,
        **more,
    }


async def chosen(node: RunningNode, blocks: range) -> None:
    with trio.fail_after(60):
        while node.served is None or node.served.engine.blocks != blocks:
            await node.state.wait_changed()


async def online_alone(directory: Directory, peer: PeerId) -> None:
    with trio.fail_after(20):
        while {span.peer for span in await directory.read()} != {peer}:  # noqa: ASYNC110 - nobody tells a DHT's readers
            await trio.sleep(0.05)


class RawSession:
    """An inference session on one node's blocks, step by step."""

    def __init__(self, call: Any, blocks: range) -> None:
        self._call, self._blocks = call, blocks

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        request = ExpertRequest(
            uid=" ".join(block_uid(PREFIX, block) for block in self._blocks),
            tensors=[encode_tensor(hidden)],
            metadata=msgpack.pack({"max_length": 16}),
        )
        await self._call.send(request)
        answer: ExpertResponse = await self._call.receive(timeout=10)
        return decode_tensor(answer.tensors[0])

    async def end(self) -> None:
        await self._call.send(ExpertRequest())
        await self._call.end()
        assert [answer async for answer in self._call] == []


@asynccontextmanager
async def raw_session(peer: Peer, server: PeerId, blocks: range) -> AsyncIterator[RawSession]:
    async with peer.client.stream(server, methods.RPC_INFERENCE, open_timeout=5) as call:
        yield RawSession(call, blocks)


async def computed_here(blocks: range, steps: list[torch.Tensor]) -> list[torch.Tensor]:
    config = EngineConfig(
        model_source(EMBEDDED_MODEL), blocks, dtype=torch.float32, cache_tokens=1024, threads=1
    )
    engine = await Engine.load(config)
    try:
        async with engine.open_session(blocks, 1, 16) as session:
            return [await session.step(step) for step in steps]
    finally:
        await engine.aclose()


def generated_here() -> list[int]:
    transformers.utils.logging.disable_progress_bar()
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        model_source(EMBEDDED_MODEL), dtype=torch.float32
    ).eval()
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


async def test_of_two_nodes_on_the_same_blocks_one_moves_and_a_client_uses_both(tmp_path: Path) -> None:
    torch.manual_seed(3)
    steps = [torch.randn(1, 3, 192), torch.randn(1, 1, 192), torch.randn(1, 1, 192)]
    first_half, second_half = range(HALF), range(HALF, BLOCKS)
    auto = model(blocks="auto", num_blocks=HALF, rebalance_seconds=0.3)
    async with running_node(node_config(tmp_path, "auto", model=auto)) as mover:
        await chosen(mover, first_half)
        before = weakref.ref(mover.served.engine)
        own = mover.contact.peer_id
        async with open_peer([mover.address], client_mode=True) as peer:
            directory = Directory(peer.dht, PREFIX, BLOCKS)
            async with raw_session(peer, own, first_half) as session:
                outputs = [await session.step(steps[0])]
                # another node comes, with the same blocks
                settings = node_config(
                    tmp_path, "fixed", bootstrap=[mover.address], model=model(blocks=f"0:{HALF}")
                )
                async with running_node(settings) as fixed:
                    await fixed.serving()
                    with trio.fail_after(60):
                        await mover.state.wait_for(Phase.DRAINING)
                    assert mover.state.facts == {"sessions": 1, "moves_to": f"{HALF}:{BLOCKS}"}
                    # the session that was open goes on, and holds the move up; new ones are refused
                    outputs.append(await session.step(steps[1]))
                    async with raw_session(peer, own, first_half) as other:
                        with pytest.raises(Exception, match="takes no new sessions"):
                            await other.step(steps[0])
                    await online_alone(directory, fixed.contact.peer_id)
                    outputs.append(await session.step(steps[2]))
                    assert mover.state.phase is Phase.DRAINING
                    await session.end()

                    await chosen(mover, second_half)
                    status = status_of(mover.state)
                    blocks = status["models"][0]["blocks"]
                    assert (blocks["first"], blocks["end"]) == (HALF, BLOCKS)
                    assert status["phase"]["name"] == "serving"
                    assert status["networks"]["petals"]["served"]["steps"] == 3  # as before the move
                    spans = {s.peer: s.blocks for s in await directory.read()}
                    assert spans == {fixed.contact.peer_id: first_half, own: second_half}

                    weights = await trio.to_thread.run_sync(load_client_weights, model_source(EMBEDDED_MODEL))
                    swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, BLOCKS))
                    async with open_session(swarm, max_length=len(PROMPT) + TOKENS) as steps_of_both:
                        prompt = torch.tensor([PROMPT])
                        made = generate(weights, steps_of_both, prompt, max_new_tokens=TOKENS)
                        tokens = [step[0] async for step in made]
                    gc.collect()
                    assert before() is None  # its weights are not kept
                    await fixed.drained()
            await mover.drained()
    assert tokens == await trio.to_thread.run_sync(generated_here)
    expected = await computed_here(first_half, steps)
    for output, local in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, local, rtol=1e-5, atol=1e-5)
