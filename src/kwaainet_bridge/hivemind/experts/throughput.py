"""How fast this node is, in the units that Petals' routing compares.

Source: Petals main ``server/throughput.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from kwaainet_bridge.engine import Engine

_STEPS = 16
_FORWARD_TOKENS = 256
_WIRE_BITS = 16  # per value of the hidden states, in the estimate that stock servers make


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second: ``overall`` is what routing and balancing compare; None is unknown.

    ``inference_rps`` is one-token steps through one block, ``forward_rps`` tokens of a long input through one
    block, ``network_rps`` tokens over the link.
    """

    overall: float
    inference_rps: float | None = None
    forward_rps: float | None = None
    network_rps: float | None = None


async def measure_throughput(
    engine: Engine, *, network_mbps: float, clock: Callable[[], float] = perf_counter
) -> Throughput:
    """Run the engine on random input for about a second and combine with the stated speed of the link."""
    model, blocks = engine.model, engine.blocks
    hidden = torch.randn(1, min(_FORWARD_TOKENS, engine.max_batch_tokens), model.hidden_size).to(model.dtype)
    steps = min(_STEPS, engine.max_length - 1)
    async with engine.open_session(blocks, 1, steps + 1) as session:
        await session.step(hidden[:, :1])  # the first use of an operator is slower
        began = clock()
        for _ in range(steps):
            await session.step(hidden[:, :1])
        inference_rps = steps * len(blocks) / (clock() - began)
    await engine.forward(hidden[:, :1], blocks)
    began = clock()
    await engine.forward(hidden, blocks)
    forward_rps = hidden.shape[1] * len(blocks) / (clock() - began)
    network_rps = network_mbps * 1e6 / (model.hidden_size * _WIRE_BITS)
    overall = min(forward_rps / ((len(blocks) + 1) / 2), network_rps)
    return Throughput(overall, inference_rps, forward_rps, network_rps)
