"""Families beyond Llama that keep to the contracts, dtypes, and those that are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from engine_support import BLOCKS, HIDDEN, SIZES, Reference, close

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.family import Family
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.errors import CheckpointError, ConfigError

ALL = range(BLOCKS)
LONG = 40


def tokens(count: int = LONG) -> torch.Tensor:
    return torch.randn(2, count, HIDDEN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
async def test_half_precision(
    llama_folder: Path, llama: Reference, dtype: torch.dtype, tolerance: float
) -> None:
    engine = await Engine.load(EngineConfig(str(llama_folder), dtype=dtype))
    assert engine.model.dtype == dtype
    assert engine.cache_bytes_per_token == 2 * 2 * 16 * 2
    hidden = tokens()
    async with engine.open_session(ALL, 2, LONG) as session:
        outputs = [await session.step(part) for part in hidden.split([30, 1, 9], 1)]
    output = torch.cat(outputs, 1)
    assert output.dtype == dtype
    close(output.float(), llama(hidden), tolerance)
    close((await engine.forward(hidden, ALL)).float(), llama(hidden), tolerance)
    grad_input, grad_prompts = await engine.backward(hidden, hidden, ALL, torch.zeros(BLOCKS, 1, 2, HIDDEN))
    assert grad_prompts is not None
    assert {grad_input.dtype, grad_prompts.dtype} == {dtype}
    await engine.aclose()


async def test_auto_is_how_the_weights_are_stored(save_model: Callable[..., Path]) -> None:
    config = tr.LlamaConfig(**SIZES)
    config.dtype = torch.bfloat16
    engine = await Engine.load(EngineConfig(str(save_model(config)), blocks=range(1)))
    assert engine.model.dtype == torch.bfloat16
    await engine.aclose()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dtype torch\.int8 is not supported: choose one of float32, bfloat16"
    ):
        EngineConfig("model", dtype=torch.int8)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tr.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128), "decoder layers are not where"),
        (
            tr.GPTJConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=64, rotary_dim=8),
            "through AttentionInterface",
        ),
        (tr.GPTNeoXConfig(**SIZES), "decoder layers do not take past_key_values"),
        (tr.Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "its attention looks ahead"),
        (
            tr.DeepseekV3Config(
                **SIZES | {"num_key_value_heads": 8, "head_dim": 8},
                first_k_dense_replace=BLOCKS,
                q_lora_rank=None,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
            ),
            r"block 0 has keys \[.*\] and values \[.*\], where its configuration says \(heads, size\)",
        ),
        (
            tr.Gemma4TextConfig(
                **SIZES,
                global_head_dim=16,
                hidden_size_per_layer_input=0,
                layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
                num_kv_shared_layers=2,
            ),
            "does not run as torch.float32",
        ),
        (
            tr.LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope scaling is 'dynamic'",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
async def test_a_family_that_does_not_fit_is_refused(
    config: Any, reason: str, save_model: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        await Engine.load(EngineConfig(str(save_model(config))))


async def test_a_window_that_the_layers_do_not_know_is_refused(
    save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose model puts its window into the mask alone would look too far back, after that many tokens."""
    monkeypatch.setattr(Family, "window", lambda _self, _block: 7)
    with pytest.raises(CheckpointError, match="block 0 should see 7 positions, and asks for another number"):
        await Engine.load(EngineConfig(str(save_model(tr.LlamaConfig(**SIZES)))))


async def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    """Its other tower has layers of the same names."""
    torch.manual_seed(7)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
    }
    config = tr.Gemma3Config(
        text_config=SIZES | {"sliding_window": 7},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )
    model = tr.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    engine = await Engine.load(EngineConfig(str(tmp_path)))
    text, hidden = model.model.language_model, tokens()
    text.norm = torch.nn.Identity()
    close(await engine.forward(hidden, ALL), text(inputs_embeds=hidden).last_hidden_state.detach(), 2e-5)
    await engine.aclose()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"model_type": "from-the-future"}, "of no known model"),
        ({"hidden_size": 65}, "of no known model|cannot be constructed"),
        ({"model_type": "clip"}, "no text-only causal language model"),
    ],
)
async def test_a_configuration_that_does_not_fit_is_refused(
    change: dict[str, Any], reason: str, save_model: Callable[..., Path]
) -> None:
    folder = save_model(tr.LlamaConfig(**SIZES))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason):
        await Engine.load(EngineConfig(str(folder)))


async def test_blocks_that_compute_something_else_are_refused(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Span.run
    monkeypatch.setattr(Span, "run", lambda *args, **kwargs: run(*args, **kwargs) * 1.01)
    with pytest.raises(CheckpointError, match="differs from what its own attention gives"):
        await Engine.load(EngineConfig(str(llama_folder)))
