"""Caches that fetch from a hub on this machine, and whether what they have is right."""

from __future__ import annotations

import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from engine_support import Reference, close
from local_hub import COMMIT, REPOSITORY

from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress, WeightCache
from kwaainet_bridge.engine.weights.hub import HttpHub

WEIGHTS = "model.safetensors"
OPEN: list[WeightCache] = []
"""To be closed when the test has ended."""


class Pauses:
    """Sleeps no time, and knows how long it should have been."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


def cache(folder: Path, **options: Any) -> WeightCache:
    weights = WeightCache(
        folder / "weights", hub=HttpHub(timeout=5), rng=random.Random(1), **{"wait": Pauses()} | options
    )
    OPEN.append(weights)
    return weights


async def load(weights: WeightCache, blocks: range, seen: list[LoadProgress] | None = None) -> Engine:
    config = EngineConfig(REPOSITORY, blocks=blocks)
    return await Engine.load(config, weights=weights, progress=None if seen is None else seen.append)


async def check(weights: WeightCache, blocks: range, folder: Path) -> None:
    """These blocks compute what those of the whole model do."""
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    whole = Reference(folder)
    expected = hidden
    for block in range(blocks.stop):
        if block == blocks.start:
            hidden = expected
        places = whole.base.rotary_emb(expected, torch.arange(5)[None])
        mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
        output = whole.layers[block](expected, attention_mask=mask, position_embeddings=places)
        expected = output[0] if isinstance(output, tuple) else output
    engine = await load(weights, blocks)
    async with aclosing(engine):
        close(await engine.forward(hidden, blocks), expected)


def kept(folder: Path) -> Path:
    return folder / "weights" / "org--name" / COMMIT / WEIGHTS


def record(folder: Path) -> Path:
    return kept(folder).with_name(WEIGHTS + ".parts.json")
