"""Linear layers with weights in eight bits, for the CPU, where a step takes as long as reading the weights does.

Weights have one scale for each output, inputs one for each token: what a session sends changes nothing for those that
are in the same batch. oneDNN's kernels, which multiply eight bits by eight, take one scale for all inputs: each token
is divided by its own largest value before, and the result multiplied by it.
"""

from __future__ import annotations

from typing import Any

import torch

from kwaainet_bridge.errors import ConfigError

WEIGHT_LEVELS = 127
"""Steps of a weight to each side of zero."""

SMALLEST = 1 << 17
"""Weights of a matrix below which the longer way to the kernel costs more than it gains."""


class Int8Linear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What the ``torch.nn.Linear`` computes whose weights it takes, in eight bits, and gradients of its inputs."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = plain.weight.detach().float()
        scales = (
            weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * WEIGHT_LEVELS) / WEIGHT_LEVELS
        )
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        self.weight = torch.nn.Parameter(torch.ops.onednn.qlinear_prepack(rounded, None), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scales", scales)
        self.register_buffer("_zeros", torch.zeros_like(scales, dtype=torch.int32), persistent=False)
        self._levels = input_levels()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in torch's layers
        if torch.is_grad_enabled() and input.requires_grad:
            output: torch.Tensor = _Differentiable.apply(input, self)
            return output
        return self.product(input)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], without a graph."""
        rows = hidden.reshape(-1, self.in_features).float()
        largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        zero = self._levels + 1
        # adding a half makes what cutting off does rounding; all are positive
        rounded = (rows / largest * self._levels + (zero + 0.5)).to(torch.uint8)
        output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1 / self._levels, zero, self.weight, self.scales, self._zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        output = output * largest
        if self.bias is not None:
            output = output + self.bias
        return output.to(hidden.dtype).reshape(*hidden.shape[:-1], self.out_features)

    def weights(self) -> torch.Tensor:
        """[out, in] in float32, as they are after eight bits."""
        return self.weight.to_dense().t().float() * self.scales[:, None]


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]  # as above
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: Int8Linear) -> torch.Tensor:  # noqa: A002
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad.float() @ ctx.layer.weights()).to(grad.dtype), None


def input_levels() -> int:
    """Steps of an input to each side of zero: without VNNI two products of eight bits may overflow sixteen."""
    return 127 if torch.cpu._is_vnni_supported() else 63  # noqa: SLF001  # the only way to ask


def check() -> None:
    """Raise ConfigError where these layers do not run."""
    if not torch.backends.mkldnn.is_available():
        raise ConfigError(
            "model.quantization int8 on a CPU needs oneDNN, which this torch lacks: set it to none"
        )
