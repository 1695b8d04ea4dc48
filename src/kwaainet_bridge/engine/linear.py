"""Linear layers that a CPU computes sooner than torch's own do, by other calls of torch for the same product.

Which calls are quickest depends on the processor's registers, the dtype and the number of tokens:

- With AVX-512 the weights lie as oneDNN's kernels read them (:class:`PackedLinear`), in float32 and where there are
  kernels for it in bfloat16. The bound is then the speed of the memory, for one token as for eight, and nearly for
  sixteen. (torch 2.13, two cores of a Zen 4, 1024 x 2816, float32: one token 0.39 ms instead of 0.69, four 0.29 instead
  of 1.27, sixteen 0.56 instead of 1.55, 128 tokens 3.4 instead of 6.1. On a Sapphire Rapids one token takes 15 % longer
  than from rows and 1024 take 10 %, four a third less, sixteen 42 %, 128 15 %.)
- With AVX2 alone the weights stay rows (:class:`SplitLinear`). ``x @ W.T`` reads them in one thread for one token; as
  a batch of products with some of the rows each, in all threads. (two cores of a Zen 3, all matrices of eight blocks of
  hidden size 1024, float32, in ms: rows, packed, split; one token 34, 31, 20; four 92, 42, 40; sixteen 100, 53, 52; 128
  310, 215, 215; 1024 1850, 1620, 1650.)
- Half precision without kernels for it is multiplied in float32 from ``WIDENED_FROM`` tokens on: torch's own way takes
  the same time for each token. (the same, four blocks, bfloat16, torch's own way and widened: 16 tokens 99 and 46, 128
  tokens 726 and 150.)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

log = logging.getLogger(__name__)

SMALLEST = 1 << 17
"""Weights of a matrix below which the longer way to the kernel costs more than it gains."""

PACKED_FOR = 64
"""Tokens for which oneDNN chooses the layout: that for 64 is as quick with one as with 512, where it is used."""

SPLIT_UP_TO = 128
"""Tokens up to which a batch of products is quicker than oneDNN's kernel for the whole matrix."""

LEAST_PARTS = 4
"""Parts of the rows; one for each thread, if those are more."""

WIDENED_FROM = 9
"""Tokens from which on half precision is widened, which costs a pass over the weights."""

WIDENED_AT_ONCE = 1 << 24
"""Weights, inputs and outputs that are in float32 at a time: 64 MiB of each, of any matrix and for any tokens."""


class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What the ``torch.nn.Linear`` computes whose weights it takes, but for rounding, and gradients of its inputs.

    The blocked weights replace the others; a backward pass brings one matrix at a time back into rows.
    """

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), PACKED_FOR)  # noqa: SLF001  # what torch's own compiler calls
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in torch's layers
        return _with_gradient(self, input)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], without a graph."""
        return _kernel(hidden, self.weight, self.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[..., in], of the inputs, for [..., out], of the outputs."""
        return linear(grad, self.weight.to_dense().t())


class SplitLinear(torch.nn.Linear):  # type: ignore[misc]  # as above
    """The ``torch.nn.Linear`` whose weights it takes, as they are; gradients of its inputs only."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as above
        return _with_gradient(self, input)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], without a graph."""
        rows = hidden.reshape(-1, self.in_features)
        if self.weight.dtype is torch.float32:
            output = _split_product(rows, self.weight, self.bias)
        elif len(rows) < WIDENED_FROM:
            return linear(hidden, self.weight, self.bias)
        else:
            output = hidden.new_empty(len(rows), self.out_features)
            for some in self._tokens(len(rows)):
                wide = rows[some].float()
                for where in self._pieces():
                    output[some, where] = _split_product(wide, *self._widened(where))
        return output.reshape(*hidden.shape[:-1], self.out_features)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[..., in], of the inputs, for [..., out], of the outputs."""
        if self.weight.dtype is torch.float32:
            return linear(grad, self.weight.t())
        rows = grad.reshape(-1, self.out_features)
        result = grad.new_empty(len(rows), self.in_features)
        for some in self._tokens(len(rows)):
            result[some] = sum(
                linear(rows[some, where].float(), self._widened(where)[0].t()) for where in self._pieces()
            )
        return result.reshape(*grad.shape[:-1], self.in_features)

    def _tokens(self, count: int) -> Iterator[slice]:
        """The inputs and outputs that are widened at a time."""
        return _slices(count, max(self.in_features, self.out_features))

    def _pieces(self) -> Iterator[slice]:
        """The outputs whose weights are widened at a time."""
        return _slices(self.out_features, self.in_features)

    def _widened(self, where: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weights and biases of a piece in float32."""
        return self.weight[where].float(), None if self.bias is None else self.bias[where].float()


def quicker(dtype: torch.dtype) -> type[PackedLinear | SplitLinear] | None:
    """What to put in the place of large layers of ``dtype`` on this machine's processor; None: nothing."""
    registers = torch.backends.cpu.get_cpu_capability()
    if registers == "AVX2" and dtype is torch.float32 and _has_kernels(dtype):
        return SplitLinear
    if _has_kernels(dtype):
        return PackedLinear
    if (
        registers in ("AVX2", "AVX512")
        and dtype in (torch.bfloat16, torch.float16)
        and _has_kernels(torch.float32)
    ):
        return SplitLinear
    return None


def replace(module: torch.nn.Module, made: type[PackedLinear | SplitLinear]) -> None:
    """Put one in the place of each plain large Linear inside ``module``, whose weights are let go of."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, made(child))
                child.weight = None


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]  # as above
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: PackedLinear | SplitLinear) -> torch.Tensor:  # noqa: A002
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.gradient(grad), None


def _with_gradient(layer: PackedLinear | SplitLinear, hidden: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and hidden.requires_grad:
        output: torch.Tensor = _Differentiable.apply(hidden, layer)
        return output
    return layer.product(hidden)


def _kernel(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN's, for weights in rows or packed."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")  # noqa: SLF001  # as above
    return output


def _split_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[N, out] of [N, in] with weights in rows, all float32."""
    if len(rows) > SPLIT_UP_TO:
        return _kernel(rows, weight, bias)
    parts = _parts(len(weight), torch.get_num_threads())
    outputs = torch.bmm(
        rows.expand(parts, *rows.shape), weight.view(parts, -1, rows.shape[1]).transpose(1, 2)
    )
    output = outputs.transpose(0, 1).reshape(len(rows), len(weight))
    return output if bias is None else output.add_(bias)


def _slices(count: int, width: int) -> Iterator[slice]:
    """Of so many rows of ``width`` numbers, each with as many as are widened at a time."""
    some = max(1, WIDENED_AT_ONCE // width)
    return (slice(first, first + some) for first in range(0, count, some))


@functools.lru_cache
def _parts(rows: int, threads: int) -> int:
    """The fewest equal parts of so many rows that are enough, or one."""
    least = max(LEAST_PARTS, threads)
    return next((parts for parts in range(least, 4 * least + 1) if rows % parts == 0), 1)


def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether this machine's processor and this torch have oneDNN's for ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        probe = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=dtype), PACKED_FOR)  # noqa: SLF001  # as above
        _kernel(torch.zeros(1, 32, dtype=dtype), probe, None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("oneDNN has no kernels for %s on this processor: %s", dtype, str(error).partition("\n")[0])
        return False
    return True
