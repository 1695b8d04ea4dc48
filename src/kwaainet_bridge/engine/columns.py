"""Linear layers that are quick for the few tokens of a step.

On the CPU with several threads, BLAS computes ``x @ W.T`` for two tokens in twice the time of one, and for sixteen in
four times. Written as ``(W @ x.T).T``, with the tokens padded to a whole register width, sixteen tokens cost hardly
more than two; the advantage shrinks with their number and ends where copying the results costs more. One token is a
matrix-vector product either way. (torch 2.13 with MKL on two cores with AVX2.)
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

WIDTH = 16
"""Tokens are padded to this many."""

MOST = 128
"""Tokens up to which it pays."""

SMALLEST = 1 << 16
"""Weights of a matrix below which the detour costs more than it gains."""


class ColumnLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is untyped here
    """``torch.nn.Linear`` with the same parameters and, but for rounding, the same results."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in the base class
        tokens = input.numel() // self.in_features
        if not 1 < tokens <= MOST:
            return linear(input, self.weight, self.bias)
        columns = input.reshape(tokens, self.in_features).t()
        if tokens < WIDTH:
            columns = pad(columns, (0, WIDTH - tokens))
        product = torch.mm(self.weight, columns.contiguous())
        output = product[:, :tokens].t()
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*input.shape[:-1], self.out_features)


def install(module: torch.nn.Module) -> None:
    """Put a ColumnLinear in the place of each plain large Linear inside ``module``, with the same parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.numel() >= SMALLEST:
                with torch.device("meta"):
                    column = ColumnLinear(child.in_features, child.out_features, child.bias is not None)
                column.weight, column.bias = child.weight, child.bias
                column.train(child.training)
                setattr(parent, name, column)
