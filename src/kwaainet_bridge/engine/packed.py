"""Linear layers whose weights lie as oneDNN's kernels read them.

On the CPU, torch computes ``x @ W.T`` from rows as they are in a checkpoint: for four tokens it takes twice the time of
one. Blocked as the kernels want them, the same weights are read at the speed of the memory, whose bound is then the
same for one token and for eight, and nearly for sixteen. (torch 2.13, two cores of a Zen 4, 1024 x 2816, float32: one
token 0.39 ms instead of 0.69, four 0.29 instead of 1.27, sixteen 0.56 instead of 1.55, 128 tokens 3.4 instead of 6.1.)

The blocked weights replace the others; a backward pass brings one matrix at a time back into rows.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import linear

log = logging.getLogger(__name__)

TOKENS = 64
"""The kernels choose the layout for a number of tokens: that for 64 is as quick with one as with 512."""

SMALLEST = 1 << 17
"""Weights of a matrix below which the longer way to the kernel costs more than it gains."""


class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What the ``torch.nn.Linear`` computes whose weights it takes, but for rounding, and gradients of its inputs."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), TOKENS)  # noqa: SLF001  # what torch's own compiler calls
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in torch's layers
        if torch.is_grad_enabled() and input.requires_grad:
            output: torch.Tensor = _Differentiable.apply(input, self.weight, self.bias)
            return output
        return _product(input, self.weight, self.bias)


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]  # as above
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,  # noqa: A002
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.weight = weight
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return linear(grad, ctx.weight.to_dense().t()), None, None


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")  # noqa: SLF001  # as above
    return output


def supported(dtype: torch.dtype) -> bool:
    """Whether this machine's processor and this torch have such kernels for ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        probe = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=dtype), TOKENS)  # noqa: SLF001  # as above
        _product(torch.zeros(1, 32, dtype=dtype), probe, None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info(
            "linear layers of %s stay unpacked on this processor: %s", dtype, str(error).partition("\n")[0]
        )
        return False
    return True


def pack(module: torch.nn.Module) -> None:
    """Put a PackedLinear in the place of each plain large Linear inside ``module``, whose weights are let go of."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, PackedLinear(child))
                child.weight = None
