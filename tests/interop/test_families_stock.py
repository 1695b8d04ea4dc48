"""Families other than Llama: stock Petals 2.2.0.post1 clients on our nodes, and our client on stock servers.

Petals 2.2.0.post1 knows BLOOM, Falcon and Llama. Its main branch knows Mixtral too, of which the blocks are compared: the
client takes them for those of a Llama of the same size, as it sees nothing but hidden states.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from child_processes import Driver
from our_nodes import start_node, wait_until_ready
from stock_swarm import START_SECONDS, StockEnvironment, start_server, wait_until_serving

from kwaainet_bridge.engine import load_client_weights
from kwaainet_bridge.hivemind.client import Directory, Swarm, generate, open_session
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer

pytestmark = pytest.mark.slow

BLOCKS, HIDDEN = 3, 64
SPANS = (range(2), range(2, BLOCKS))
COMMON = {"hidden_size": HIDDEN, "vocab_size": 96, "initializer_range": 0.1}
FALCON = COMMON | {"num_hidden_layers": BLOCKS, "num_attention_heads": 8}
STOCK_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", COMMON | {"n_layer": BLOCKS, "n_head": 8}),
    "falcon-7b": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
}
LLAMA = {
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
PROMPTS = [[1, 50, 60, 70, 80, 90, 33], [2, 41, 42, 43, 44, 45, 46], [7, 8, 9, 10, 11, 12, 13]]


@dataclass(frozen=True)
class Served:
    """Two nodes of ours that have a part of each model, and a stock client that knows all of these by their names."""

    address: str
    client: Driver
    folders: dict[str, Path]


def save_mixtral(folder: Path) -> None:
    torch.manual_seed(4)
    config = transformers.MixtralConfig(**COMMON, **LLAMA, num_local_experts=4, sliding_window=5)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(stock: StockEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("families")
    folders = {name: work / name for name in (*STOCK_MODELS, "mixtral")}
    with stock.script("petals_client.py") as client, start_node(work, "bootstrap") as bootstrap:
        client.event("ready", within=START_SECONDS)
        for name, (model_type, options) in STOCK_MODELS.items():
            client.ask("make_model", folder=str(folders[name]), model_type=model_type, options=options)
        client.ask("make_model", folder=str(work / "as-llama"), model_type="llama", options=COMMON | LLAMA)
        save_mixtral(folders["mixtral"])
        address = wait_until_ready(bootstrap)

        def entries(blocks: range) -> list[dict[str, Any]]:
            common = {
                "blocks": f"{blocks.start}:{blocks.stop}",
                "dtype": "float32",
                "throughput": 1.0,
                "threads": 1,
            }
            return [{"name": str(folder), "dht_prefix": name, **common} for name, folder in folders.items()]

        with (
            start_node(work, "first", models=entries(SPANS[0]), peers=[address]) as first,
            start_node(work, "second", models=entries(SPANS[1]), peers=[address]) as second,
        ):
            for node, blocks in ((first, SPANS[0]), (second, SPANS[1])):
                for name in folders:
                    node.wait_for(rf"serving +{name} {blocks.start}:{blocks.stop} of 3", START_SECONDS)
            for name, folder in folders.items():
                asked = {"prefix": name, "peers": [address], "model": str(folder)}
                if name == "mixtral":
                    asked |= {"model": str(work / "as-llama"), "reference": False}
                client.ask("load", key=name, within=START_SECONDS, **asked)
            yield Served(address, client, folders)


@pytest.mark.parametrize("name", STOCK_MODELS)
def test_a_stock_client_on_our_nodes(name: str, served: Served) -> None:
    ask = served.client.ask
    assert [(hop["start"], hop["end"]) for hop in ask("route", key=name)] == [(0, 2), (2, 3)]
    assert max(ask("forward", key=name, ids=PROMPTS).values()) < 1e-5
    assert ask("backward", key=name, ids=PROMPTS) < 1e-4
    for options in ({}, {"calls": 4}, {"beams": 3}):
        tokens = ask("generate", key=name, ids=PROMPTS[:1], new_tokens=16, **options)
        assert tokens["swarm"] == tokens["local"]
        assert len(tokens["swarm"][0]) == 16
    tokens = ask("generate", key=name, ids=PROMPTS, new_tokens=12)
    assert tokens["swarm"] == tokens["local"]


def test_blocks_of_mixtral_through_a_stock_client(served: Served) -> None:
    shape, seed = [2, 12, HIDDEN], 9
    found = served.client.ask("run_blocks", key="mixtral", shape=shape, seed=seed, steps=[8, 1, 1, 2])
    whole = transformers.AutoModelForCausalLM.from_pretrained(served.folders["mixtral"], dtype=torch.float32)
    whole.eval().model.norm = torch.nn.Identity()
    hidden = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = whole.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    for outputs in found.values():
        torch.testing.assert_close(torch.tensor(outputs), expected, rtol=1e-4, atol=1e-4)


# --- our client, with embeddings and head of these models


@asynccontextmanager
async def our_client(address: str, prefix: str) -> AsyncIterator[Swarm]:
    async with open_host(HostConfig(identity=Identity.generate("ed25519"), listen=[])) as host:
        client = RpcClient(host)
        dht = DhtNode(host, RpcServer(host), client, client_mode=True)
        async with dht.running():
            (result,) = await dht.bootstrap([await host.connect(address)])
            assert result.ok, result
            directory = Directory(dht, prefix, BLOCKS)
            yield Swarm(client, directory, ping=dht.ping, rng=random.Random(1))


async def our_tokens(folder: Path, address: str, prefix: str, count: int) -> tuple[list[list[int]], set[Any]]:
    """What our client generates, and the servers that it used."""
    weights, ids = load_client_weights(str(folder)), torch.tensor(PROMPTS)
    async with (
        our_client(address, prefix) as swarm,
        open_session(swarm, batch_size=len(ids), max_length=ids.shape[1] + count) as session,
    ):
        steps = [step async for step in generate(weights, session, ids, max_new_tokens=count)]
        hops = {hop for _, route in session.routes for hop in route}
    return torch.tensor(steps).T.tolist(), hops


@pytest.mark.parametrize("name", ["bloom", "falcon-40b"])
async def test_our_client_on_a_stock_server_and_our_node(
    name: str, stock: StockEnvironment, served: Served, tmp_path: Path
) -> None:
    """Its tokens are those that the stock client has of the same model in one process."""
    folder, prefix = served.folders[name], f"{name}-mixed"
    with (
        start_server(stock, folder, prefix=prefix, blocks=SPANS[0], peers=[served.address]) as server,
        start_node(
            tmp_path, "node", model=folder, prefix=prefix, blocks=SPANS[1], peers=[served.address]
        ) as node,
    ):
        wait_until_serving(server)
        wait_until_ready(node)
        tokens, hops = await our_tokens(folder, served.address, prefix, 12)
    expected = served.client.ask("generate", key=name, ids=PROMPTS, new_tokens=12)
    assert tokens == expected["local"]
    assert len(hops) == 2
