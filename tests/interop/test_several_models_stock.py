"""Stock Petals 2.2.0.post1 clients on one node of ours that serves two models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from child_processes import Driver
from our_nodes import start_node, wait_until_ready
from stock_swarm import ROOT, START_SECONDS, StockEnvironment

pytestmark = pytest.mark.slow

LLAMA = ROOT / "tests" / "vectors" / "petals-tiny-llama" / "model"
AUSTEN = ROOT / "src" / "kwaainet_bridge" / "models" / "austen"
MODELS = {"llama-hf": LLAMA, "austen-hf": AUSTEN}
PROMPT = [1, 50, 60, 70, 80, 90, 100]
TOKENS = 24


def entry(prefix: str, folder: Path) -> dict[str, Any]:
    return {"name": str(folder), "dht_prefix": prefix, "dtype": "float32", "throughput": 1.0, "threads": 1}


def test_two_clients_generate_with_two_models_of_one_node_at_once(stock: StockEnvironment, tmp_path: Path):
    models = [entry(prefix, folder) for prefix, folder in MODELS.items()]
    with (
        stock.script("petals_client.py") as first,
        stock.script("petals_client.py") as second,
        start_node(tmp_path, "bootstrap") as bootstrap,
    ):
        address = wait_until_ready(bootstrap)
        with start_node(tmp_path, "node", models=models, peers=[address]) as node:
            for prefix in MODELS:
                node.wait_for(rf"serving +{prefix} 0:8 of 8", START_SECONDS)
            clients = dict(zip(MODELS, (first, second), strict=True))
            for prefix, client in clients.items():
                client.event("ready", within=START_SECONDS)
                asked = {"model": str(MODELS[prefix]), "prefix": prefix, "peers": [address]}
                client.ask("load", key=prefix, within=START_SECONDS, **asked)
            assert first.ask("subkeys", key="llama-hf", dht_key="_petals.models") == ["austen-hf", "llama-hf"]

            def generate(of: tuple[str, Driver]) -> dict[str, Any]:
                tokens: dict[str, Any] = of[1].ask("generate", key=of[0], ids=[PROMPT], new_tokens=TOKENS)
                return tokens

            with ThreadPoolExecutor(len(clients)) as both:
                found = list(both.map(generate, clients.items()))
            for tokens in found:
                assert tokens["swarm"] == tokens["local"]
                assert len(tokens["swarm"][0]) == TOKENS
            assert found[0]["swarm"] != found[1]["swarm"]
