"""From a model's configuration to its decoder layers, for every family that keeps to the common contracts.

The contracts: a causal language model of transformers whose base model has ``layers`` and ``rotary_emb``;
layers that take position embeddings and a cache, and reach attention through AttentionInterface. What a
family does beyond them is refused when the model is loaded, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from kwaainet_bridge.engine import attention
from kwaainet_bridge.engine.checkpoint import Checkpoint
from kwaainet_bridge.errors import CheckpointError

LAYER_TYPES = {"full_attention", "sliding_attention"}
LAYER_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "position_embeddings",
}


@dataclass(frozen=True, slots=True)
class Family:
    """A model without weights: its configuration, and the modules on the meta device.

    ``base`` is the model inside ``causal_lm`` that has the layers.
    """

    config: Any
    causal_lm: torch.nn.Module
    base: torch.nn.Module

    @property
    def num_blocks(self) -> int:
        return len(self.base.layers)

    @property
    def head_dim(self) -> int:
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def layer_type(self, block: int) -> str:
        types = getattr(self.config, "layer_types", None)
        return types[block] if types else "full_attention"

    def rotary(self) -> torch.nn.Module:
        """The model's rotary embedding with its real frequencies, on the CPU."""
        with torch.device("cpu"):
            module: torch.nn.Module = type(self.base.rotary_emb)(self.config)
        return module


def build(checkpoint: Checkpoint) -> Family:
    """Construct the checkpoint's model on the meta device: no weight is read, no memory taken.

    Raises CheckpointError if the configuration is of no model that can be served.
    """
    family = checkpoint.config.get("model_type")
    if checkpoint.config.get("quantization_config"):
        raise _refused(checkpoint, "its weights are quantised; use the original checkpoint")
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, attn_implementation=attention.NAME, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise _refused(checkpoint, f"config.json is of no known model ({error})") from error
    if not hasattr(config, "num_hidden_layers") or type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001  # the only way to ask without constructing
        raise _refused(checkpoint, f"{family} is no text-only causal language model")
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM._model_mapping[type(config)](config)  # noqa: SLF001  # from_config changes torch's default dtype for all threads
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _refused(checkpoint, f"its model cannot be constructed ({error})") from error
    base = getattr(causal_lm, causal_lm.base_model_prefix, None)
    reason = _mismatch(config, causal_lm, base)
    if reason is not None:
        raise _refused(checkpoint, reason)
    assert base is not None
    causal_lm.eval().requires_grad_(requires_grad=False)
    return Family(config, causal_lm, base)


def _mismatch(config: Any, causal_lm: Any, base: Any) -> str | None:
    """Why the family does not keep to the contracts; None if it does, as far as its definition tells."""
    if not getattr(causal_lm, "_supports_attention_backend", False):
        return "its attention does not go through AttentionInterface"
    layers = getattr(base, "layers", None)
    if layers is None or len(layers) != config.num_hidden_layers:
        return "its decoder layers are not where other families have them"
    if not isinstance(getattr(base, "rotary_emb", None), torch.nn.Module):
        return "it has no rotary position embedding"
    arguments = inspect.signature(layers[0].forward).parameters.keys()
    if missing := LAYER_ARGUMENTS - arguments:
        return f"its decoder layers do not take {', '.join(sorted(missing))}"
    if other := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(kind == "dynamic" for kind in rope_types(config)):
        return "its rope scaling is 'dynamic', which depends on the longest sequence that the node has seen"
    return None


def rope_types(config: Any) -> set[str]:
    """The kinds of rope scaling that the model uses: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (nested or [parameters])}


def takes_layer_type(rotary: torch.nn.Module) -> bool:
    """Whether the family has one rotary embedding for each type of layer."""
    forward: Callable[..., Any] = rotary.forward
    return "layer_type" in inspect.signature(forward).parameters


def _refused(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.name} (model_type {checkpoint.config.get('model_type')}) cannot be served: {reason}"
    )
