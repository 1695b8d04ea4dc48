"""From a model's configuration to its decoder layers, for every family that keeps to the common contracts.

The contracts: a causal language model of transformers whose base model has ``layers`` and ``rotary_emb``;
layers that take position embeddings and a cache, and reach attention through AttentionInterface. Or the older
contract of BLOOM and Falcon: the layers are called ``h``, take a cache, a mask and ``alibi``, and attend by themselves.
What a family does beyond them is refused when the model is loaded, with the reason.
"""

from __future__ import annotations

import inspect
import sys
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
    "past_key_values",
    "position_embeddings",
}
OWN_ATTENTION_ARGUMENTS = {"hidden_states", "attention_mask", "layer_past", "alibi"}


@dataclass(frozen=True, slots=True)
class Family:
    """A model without weights: its configuration, and the modules on the meta device.

    ``base`` is the model inside ``causal_lm`` that has the layers.
    """

    config: Any
    causal_lm: torch.nn.Module
    base: torch.nn.Module

    @property
    def attends_itself(self) -> bool:
        """Whether its layers attend by themselves, and not through AttentionInterface."""
        return _attends_itself(self.causal_lm)

    @property
    def layers_name(self) -> str:
        """What the list of layers is called."""
        return _layers_name(self.causal_lm)

    @property
    def layers(self) -> Any:
        return getattr(self.base, self.layers_name)

    @property
    def uses_alibi(self) -> bool:
        return self.attends_itself and _uses_alibi(self.config, self.base)

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    @property
    def head_dim(self) -> int:
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        if self.attends_itself:  # the configuration counts them in other ways than its layers do
            own = getattr(self.layers[0].self_attention, "num_kv_heads", None)
            return int(own or self.config.num_attention_heads)
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def layer_type(self, block: int) -> str:
        types = getattr(self.config, "layer_types", None)
        return types[block] if types else "full_attention"

    def window(self, block: int) -> int | None:
        """How many positions a query of this block sees, as the configuration has it; None is all."""
        if self.layer_type(block) != "sliding_attention" and getattr(self.config, "layer_types", None):
            return None
        window = getattr(self.config, "sliding_window", None)
        return None if window is None or self.attends_itself else int(window)

    def rotary(self) -> torch.nn.Module | None:
        """The model's rotary embedding with its real frequencies, on the CPU; None if it has none."""
        if not hasattr(self.base, "rotary_emb"):
            return None
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
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise _refused(checkpoint, f"config.json is of no known model ({error})") from error
    # of a model that sees or hears as well: the part that is a language model
    config = config.get_text_config()
    if not hasattr(config, "num_hidden_layers") or type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001  # the only way to ask without constructing
        raise _refused(checkpoint, f"{family} is no text-only causal language model")
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001  # from_config changes torch's default dtype for all threads
        own = "sdpa" if model_class._supports_sdpa else "eager"  # noqa: SLF001  # an attribute for subclasses of theirs
        config._attn_implementation = own if _attends_itself(model_class) else attention.NAME  # noqa: SLF001  # how it is set
        with torch.device("meta"):
            causal_lm = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _refused(checkpoint, f"its model cannot be constructed ({error})") from error
    base = getattr(causal_lm, causal_lm.base_model_prefix, None)
    reason = _mismatch(config, causal_lm, base)
    if reason is not None:
        raise _refused(checkpoint, reason)
    assert base is not None
    causal_lm.eval().requires_grad_(requires_grad=False)
    return Family(config, causal_lm, base)


def _attends_itself(model: Any) -> bool:
    return not getattr(model, "_supports_attention_backend", False)


def _layers_name(model: Any) -> str:
    return "h" if _attends_itself(model) else "layers"


def _uses_alibi(config: Any, base: Any) -> bool:
    return bool(getattr(config, "alibi", not hasattr(base, "rotary_emb")))


def _mismatch(config: Any, causal_lm: Any, base: Any) -> str | None:
    """Why the family does not keep to the contracts; None if it does, as far as its definition tells."""
    layers: Any = getattr(base, _layers_name(causal_lm), None)
    placed = layers is not None and len(layers) == config.num_hidden_layers
    arguments = set(inspect.signature(layers[0].forward).parameters) if placed else set()
    if _attends_itself(causal_lm):
        if OWN_ATTENTION_ARGUMENTS - arguments:
            return "its attention does not go through AttentionInterface"
        if _uses_alibi(config, base) and alibi_builder(base) is None:
            return "its ALiBi is not made as other families make theirs"
    else:
        if not placed:
            return "its decoder layers are not where other families have them"
        if not isinstance(getattr(base, "rotary_emb", None), torch.nn.Module):
            return "it has no rotary position embedding"
        if missing := LAYER_ARGUMENTS - arguments:
            return f"its decoder layers do not take {', '.join(sorted(missing))}"
    if other := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(getattr(module, "is_causal", True) is False for layer in layers for module in layer.modules()):
        return "its attention looks ahead"
    if any(kind == "dynamic" for kind in rope_types(config)):
        return "its rope scaling is 'dynamic', which depends on the longest sequence that the node has seen"
    return None


def alibi_builder(base: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """The function with which a family makes its biases of (attention mask, heads, dtype); None without one."""
    return getattr(sys.modules[type(base).__module__], "build_alibi_tensor", None)


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
