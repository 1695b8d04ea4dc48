"""The whole model that engines are compared with, and how close is close."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trio
import trio.testing

from kwaainet_bridge.engine import Engine

VECTORS = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama"
HIDDEN = 64
BLOCKS = 6
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

transformers.utils.logging.disable_progress_bar()


class Reference:
    """The whole model in transformers, from its first block up to before its final norm."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.requires_grad_(requires_grad=False)
        self.base = getattr(self.model, self.model.base_model_prefix)
        self.layers = self.base.layers if hasattr(self.base, "layers") else self.base.h
        for around in ("norm", "ln_f", "word_embeddings_layernorm"):
            if hasattr(self.base, around):
                setattr(self.base, around, torch.nn.Identity())

    def __call__(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        hooks = []
        for index, layer in enumerate(self.layers):

            def add(
                _layer: Any, args: tuple[torch.Tensor, ...], index: int = index
            ) -> tuple[torch.Tensor, ...] | None:
                if prompts is None:
                    return None
                state = args[0]
                padded = torch.nn.functional.pad(prompts[index], (0, 0, 0, state.shape[1] - prompts.shape[2]))
                return (state + padded, *args[1:])

            hooks.append(layer.register_forward_pre_hook(add))
        try:
            return self.base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()

    def by_block(self, hidden: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What goes into each block and what comes out."""
        inputs, outputs = [], []

        def note(_layer: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
            inputs.append(args[0])
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            self.base(inputs_embeds=hidden, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, outputs


async def at_once(engine: Engine, *steps: Callable[[], Awaitable[Any]]) -> list[Any]:
    """The results of steps that were all ready, one after the other, before the first began."""
    results: list[Any] = [None] * len(steps)
    release = threading.Event()

    async def run(index: int) -> None:
        results[index] = await steps[index]()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._compute.run, partial(release.wait, 10))
        await trio.testing.wait_all_tasks_blocked()
        for index in range(len(steps)):
            nursery.start_soon(run, index)
            await trio.testing.wait_all_tasks_blocked()
        release.set()
    return results


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if actual.numel() == 0:
        return
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), difference
