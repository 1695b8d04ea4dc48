"""Small random models of every family that the engine is tested with, and the histories that they are tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from engine_support import HIDDEN, LLAMA3_ROPE

BLOCKS = 3
WINDOW = 7
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
WIDE = SIZES | {"head_dim": 16}
"""Heads that are together wider than the hidden state."""
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "factor": 4.0,
}
LONGROPE_CHANGES_AT = 32
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "vocab_size": 64, "initializer_range": 0.1}
FALCON = OLD | {"num_attention_heads": 8, "max_position_embeddings": 512}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: tr.LlamaConfig(**SIZES | {"num_key_value_heads": 8}),
    "llama3.1": lambda: tr.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": lambda: tr.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "llama-yarn": lambda: tr.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": lambda: tr.MistralConfig(**SIZES, sliding_window=WINDOW),
    "mistral-narrow": lambda: tr.MistralConfig(**SIZES, sliding_window=2),
    "mixtral": lambda: tr.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=WINDOW),
    "qwen2": lambda: tr.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": lambda: tr.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: tr.Qwen3Config(**WIDE),
    "qwen2-moe": lambda: tr.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": lambda: tr.Qwen3MoeConfig(**WIDE, **EXPERTS),
    "gemma": lambda: tr.GemmaConfig(**WIDE),
    "gemma2": lambda: tr.Gemma2Config(
        **WIDE,
        layer_types=LAYERS,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": lambda: tr.Gemma3TextConfig(
        **WIDE,
        layer_types=LAYERS,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
    ),
    "phi3": lambda: tr.Phi3Config(**SIZES, pad_token_id=0, sliding_window=WINDOW),
    "phi3-longrope": lambda: tr.Phi3Config(
        **SIZES,
        pad_token_id=0,
        original_max_position_embeddings=LONGROPE_CHANGES_AT,
        rope_parameters=LONGROPE,
    ),
    "gpt-oss": lambda: tr.GptOssConfig(
        **WIDE, num_local_experts=4, num_experts_per_tok=2, layer_types=LAYERS, sliding_window=WINDOW
    ),
    "olmo2": lambda: tr.Olmo2Config(**SIZES),
    "olmo3": lambda: tr.Olmo3Config(**SIZES, layer_types=LAYERS, sliding_window=WINDOW),
    "olmoe": lambda: tr.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "granite": lambda: tr.GraniteConfig(**SIZES, attention_multiplier=0.2, residual_multiplier=0.5),
    "smollm3": lambda: tr.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], pad_token_id=0),
    "starcoder2": lambda: tr.Starcoder2Config(**SIZES, sliding_window=WINDOW),
    "cohere2": lambda: tr.Cohere2Config(**SIZES, layer_types=LAYERS, sliding_window=WINDOW, pad_token_id=0),
    "bloom": lambda: tr.BloomConfig(**OLD, n_head=8),
    "falcon-7b": lambda: tr.FalconConfig(**FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": lambda: tr.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": lambda: tr.FalconConfig(
        **FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
}
EXACT_IN_HALF = [name for name in CONFIGS if "moe" not in name and name not in ("mixtral", "gpt-oss")]
"""Those without experts: which ones a token goes to depends on the last bits."""


def save(name: str, folder: Path, **how: Any) -> None:
    """Write a model with random weights, norms and biases."""
    torch.manual_seed(7)
    model = tr.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.requires_grad_(requires_grad=False).parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.save_pretrained(folder, **how)


def random_hidden(rows: int, count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, count, HIDDEN, generator=torch.Generator().manual_seed(seed))
