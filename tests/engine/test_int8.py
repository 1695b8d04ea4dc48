"""Linear layers in eight bits, beside the exact ones."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn.functional import linear

from kwaainet_bridge.engine import int8 as module
from kwaainet_bridge.engine.int8 import Int8Linear, input_levels
from kwaainet_bridge.engine.quantized import quantise

ERROR = 0.015
"""Of a matrix' output, relative, by norms; 0.010 was measured."""


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(((left - right).detach().norm(dim=-1) / right.detach().norm(dim=-1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", sorted({63, input_levels()}))  # more than it has, a processor gets wrong
def test_it_is_nearly_the_linear_layer(
    dtype: torch.dtype, levels: int, monkeypatch: pytest.MonkeyPatch, *, bias: bool
) -> None:
    monkeypatch.setattr(module, "input_levels", lambda: levels)
    torch.manual_seed(1)
    plain = torch.nn.Linear(512, 320, bias=bias, dtype=dtype)
    weight = plain.weight.detach().clone()
    layer = Int8Linear(plain)
    inputs = torch.randn(2, 9, 512) * torch.logspace(-3, 3, 9)[:, None]  # tokens of very different sizes
    inputs = inputs.to(dtype).requires_grad_()
    expected = linear(inputs, weight, plain.bias)
    output = layer(inputs)
    assert output.dtype is dtype
    assert distance(output.float(), expected.float()) < ERROR * 127 / levels + (
        0.01 if dtype is torch.bfloat16 else 0
    )
    target = torch.randn(2, 9, 320).to(dtype)
    (ours,) = torch.autograd.grad((output * target).sum(), inputs)
    (theirs,) = torch.autograd.grad((expected * target).sum(), inputs)
    assert distance(ours.float(), theirs.float()) < 0.02


def test_a_token_does_not_change_what_others_get() -> None:
    layer = Int8Linear(torch.nn.Linear(512, 320))
    alone = torch.randn(1, 1, 512)
    loud = torch.cat([alone, torch.full((1, 1, 512), 1e6), torch.zeros(1, 1, 512)], 1)
    with torch.no_grad():
        assert torch.equal(layer(loud)[:, :1], layer(alone))
        assert torch.equal(layer(loud)[0, 2], layer.bias)


def test_memory_is_a_quarter_and_the_plain_weights_are_let_go_of() -> None:
    plain = torch.nn.Linear(512, 320, bias=False)
    outer = torch.nn.ModuleDict({"large": plain, "small": torch.nn.Linear(8, 8)})
    rows = weakref.ref(plain.weight)
    assert quantise("int8", outer, torch.device("cpu")) == 512 * 320
    gc.collect()
    assert rows() is None
    assert isinstance(outer["large"], Int8Linear)
    assert type(outer["small"]) is torch.nn.Linear
    assert sum(p.numel() * p.element_size() for p in outer["large"].parameters()) == 512 * 320


def test_inputs_have_seven_bits_where_products_could_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, levels in ((True, 127), (False, 63)):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda answer=supported: answer)
        assert input_levels() == levels
