"""Adapters for tests, as peft saves them, and what a model with one of them gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_support import Reference
from safetensors.torch import load_file, save_file

LLAMA = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def make_adapter(
    folder: Path,
    model: Path,
    modules: tuple[str, ...] = LLAMA,
    *,
    rank: int = 4,
    seed: int = 1,
    **config: Any,
) -> Path:
    """A random adapter, saved as peft does, for these modules of all blocks but the first."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    base = getattr(whole, whole.base_model_prefix)
    layers_name = "layers" if hasattr(base, "layers") else "h"
    stem = f"base_model.model.{whole.base_model_prefix}.{layers_name}"
    tensors = {}
    for block in range(1, len(getattr(base, layers_name))):
        for module in modules:
            linear = getattr(base, layers_name)[block].get_submodule(module)
            for side, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
                name = f"{stem}.{block}.{module}.lora_{side}.weight"
                tensors[name] = torch.randn(*shape, generator=generator) * 0.1
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(rank, 4)  # the clients' business
    write_adapter(folder, tensors, r=rank, **config)
    return folder


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def merged(model: Path, adapter: Path, scale: float) -> Reference:
    """The whole model with the adapter added to its weights."""
    reference = Reference(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith("lora_A.weight") and "lm_head" not in name:
                up = tensors[name.replace("lora_A", "lora_B")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                reference.model.get_submodule(path).weight += up @ down * scale
    return reference
