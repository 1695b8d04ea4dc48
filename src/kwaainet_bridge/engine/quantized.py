"""Linear layers with fewer bits for each weight: in four bits anywhere, in eight bits on GPUs, both by bitsandbytes.

That library is imported when it is asked for. Eight bits on the CPU are :mod:`kwaainet_bridge.engine.int8`, which needs
nothing more. What a layer holds is in its parameters and buffers, so that memory is counted, not estimated.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from kwaainet_bridge.engine import int8
from kwaainet_bridge.engine.config import Quantization
from kwaainet_bridge.engine.int8 import SMALLEST, Int8Linear
from kwaainet_bridge.engine.linear import PackedLinear
from kwaainet_bridge.errors import ConfigError

BLOCK: Final = 64
"""Weights of a row that share a scale in four bits."""

OUTLIER: Final = 6.0
"""Inputs from which on a GPU multiplies their columns in sixteen bits: what LLM.int8 and stock servers take."""

LEAST_SHARE: Final = 0.5
"""Of a block's weights that are quantised at least: a node must not call blocks quantised that are as large as ever."""

TOLERANCE: Final = 5e-2
"""How far two ways to compute a quantised block may be from each other, relative to its largest output: an input that
differs in its last bit may be rounded to the next of its 255 values."""


class Nf4Linear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What the ``torch.nn.Linear`` computes whose weights it takes, in four bits, and gradients of its inputs.

    Each ``BLOCK`` weights have a scale, which has eight bits itself: about 4.13 bits for each weight.
    """

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        functional = bitsandbytes().functional
        packed, state = functional.quantize_4bit(
            plain.weight.detach(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("weight", packed)
        self.register_buffer("scales", state.absmax)
        self.register_buffer("scales_of_scales", state.state2.absmax)
        self.bias = plain.bias
        self._state = state
        self._product = bitsandbytes().matmul_4bit

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in torch's layers
        output: torch.Tensor = self._product(input, self.weight, self._state, bias=self.bias)
        return output


class MixedInt8Linear(torch.nn.Module):  # type: ignore[misc]  # as above
    """What the ``torch.nn.Linear`` computes whose weights it takes, in eight bits, and gradients of its inputs.

    Columns with inputs above ``OUTLIER`` are multiplied in float16, into which all inputs go.
    """

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        modules = bitsandbytes().nn
        weight = plain.weight.detach()
        inner = modules.Linear8bitLt(
            *(self.in_features, self.out_features), bias=False, has_fp16_weights=False, threshold=OUTLIER
        )
        inner.weight = modules.Int8Params(
            weight.to(torch.float16), has_fp16_weights=False, requires_grad=False
        )
        self.inner = inner.to(weight.device).eval()  # this is where it rounds
        self.register_buffer("scales", self.inner.weight.SCB)
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as above
        output: torch.Tensor = self.inner(input.to(torch.float16)).to(input.dtype)
        return output if self.bias is None else output + self.bias


LINEAR: Final = (torch.nn.Linear, PackedLinear, Int8Linear, Nf4Linear, MixedInt8Linear)
"""All that is a linear layer here."""


def bitsandbytes() -> Any:
    """The library. Raises ConfigError where it is not installed or does not start."""
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            "model.quantization needs bitsandbytes for four bits, and on GPUs for eight: "
            f"pip install 'kwaainet-bridge[quantized]', or set it to none ({str(error).partition(chr(10))[0]})"
        ) from error
    return library


def check(kind: Quantization, device: torch.device) -> None:
    """Raise ConfigError where weights cannot be quantised so."""
    if kind == "none":
        return
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.quantization {kind} is for cpu and cuda, not for {device}: set it to none")
    if kind == "int8" and device.type == "cpu":
        int8.check()
    else:
        bitsandbytes()


def quantise(kind: Quantization, module: torch.nn.Module, device: torch.device) -> int:
    """Put quantised layers in the place of the plain large ones inside ``module``, whose weights are let go of.

    Returns how many weights those had. In four bits rows must be a multiple of ``BLOCK`` long; others stay as they are.
    """
    done = 0
    if kind == "nf4":
        made: type[torch.nn.Module] = Nf4Linear
    else:
        made = Int8Linear if device.type == "cpu" else MixedInt8Linear
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child.weight.numel() < SMALLEST:
                continue
            if made is Nf4Linear and child.in_features % BLOCK:
                continue
            done += int(child.weight.numel())
            setattr(parent, name, made(child))
            child.weight = None
    return done
