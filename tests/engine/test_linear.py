"""Linear layers by quicker calls, beside torch's own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kwaainet_bridge.engine import linear
from kwaainet_bridge.engine.linear import SPLIT_UP_TO, WIDENED_FROM, PackedLinear, SplitLinear, replace

HALF = (torch.bfloat16, torch.float16)
KINDS = [
    (PackedLinear, torch.float32),
    (PackedLinear, torch.bfloat16),
    (SplitLinear, torch.float32),
    (SplitLinear, torch.bfloat16),
    (SplitLinear, torch.float16),
]
Made = type[PackedLinear | SplitLinear]


def layers(
    made: Made, dtype: torch.dtype, *, bias: bool, rows: int = 320
) -> tuple[torch.nn.Linear, PackedLinear | SplitLinear]:
    torch.manual_seed(1)
    plain = torch.nn.Linear(512, rows, bias=bias, dtype=dtype)
    outer = torch.nn.ModuleDict({"large": plain, "small": torch.nn.Linear(8, 8)})
    kept = torch.nn.Linear(512, rows, bias=bias, dtype=dtype)
    kept.load_state_dict(plain.state_dict())
    replace(outer, made)
    assert type(outer["small"]) is torch.nn.Linear
    assert type(outer["large"]) is made
    return kept, outer["large"]


@pytest.mark.parametrize(
    "tokens", [1, 2, 5, WIDENED_FROM - 1, WIDENED_FROM, 17, SPLIT_UP_TO, SPLIT_UP_TO + 1]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("made", "dtype"), KINDS)
def test_it_is_the_linear_layer(made: Made, dtype: torch.dtype, tokens: int, *, bias: bool) -> None:
    if made is PackedLinear and not linear._has_kernels(dtype):
        return  # such a processor computes with other layers
    plain, quick = layers(made, dtype, bias=bias)
    results = []
    for layer in (plain, quick):
        inputs = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
        silent = layer(inputs).detach()
        inputs.requires_grad_()
        output = layer(inputs)
        output.square().sum().backward()
        results.append((silent, output.detach(), inputs.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        assert ours.shape == theirs.shape
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("rows", [317, 4 * 79, 2 * 5 * 37])
def test_rows_that_cannot_be_halved(rows: int) -> None:
    plain, quick = layers(SplitLinear, torch.float32, bias=True, rows=rows)
    for shape in ((512,), (3, 512), (2, 2, 512)):
        inputs = torch.randn(shape)
        torch.testing.assert_close(quick(inputs), plain(inputs))


@pytest.mark.parametrize("weights", [1, 512 * 100, 512 * 320, 1 << 24])
def test_weights_and_tokens_are_widened_some_at_a_time(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WIDENED_AT_ONCE", weights)
    most, products = [], []
    product = linear._split_product

    def note(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        most.extend((weight.numel(), rows.numel()))
        products.append(len(rows) * len(weight))
        return product(rows, weight, bias)

    monkeypatch.setattr(linear, "_split_product", note)
    plain, quick = layers(SplitLinear, torch.bfloat16, bias=True)
    inputs = torch.randn(3, WIDENED_FROM, 512).bfloat16().requires_grad_()
    output = quick(inputs)
    expected = inputs.double() @ plain.weight.double().T + plain.bias.double()
    torch.testing.assert_close(output, expected.bfloat16(), rtol=2e-2, atol=1e-4)
    (grad,) = torch.autograd.grad(output.sum(), inputs)
    sums = plain.weight.float().sum(0).expand(grad.shape)
    torch.testing.assert_close(grad.float(), sums, rtol=2e-2, atol=1e-2)
    assert max(most) <= max(weights, 512)
    assert sum(products) == 3 * WIDENED_FROM * 320


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Widened: what float32 gives, rounded; the weights' own dtype is what is kept in memory."""
    plain, quick = layers(SplitLinear, dtype, bias=True)
    inputs = torch.randn(WIDENED_FROM, 512).to(dtype)
    exact = inputs.double() @ plain.weight.double().T + plain.bias.double()
    torch.testing.assert_close(quick(inputs), exact.to(dtype), rtol=1e-2, atol=1e-5)
    assert quick.weight.dtype is dtype


@pytest.mark.parametrize(
    ("registers", "kernels", "dtype", "expected"),
    [
        ("AVX512", (torch.float32, torch.bfloat16), torch.float32, PackedLinear),
        ("AVX512", (torch.float32, torch.bfloat16), torch.bfloat16, PackedLinear),
        ("AVX512", (torch.float32,), torch.bfloat16, SplitLinear),
        ("AVX2", (torch.float32,), torch.float32, SplitLinear),
        ("AVX2", (torch.float32,), torch.bfloat16, SplitLinear),
        ("AVX2", (torch.float32, torch.bfloat16), torch.bfloat16, PackedLinear),
        ("AVX2", (torch.float32,), torch.float64, None),
        ("AVX2", (), torch.float32, None),
        ("DEFAULT", (torch.float32,), torch.float32, PackedLinear),
        ("DEFAULT", (torch.float32,), torch.float16, None),
    ],
)
def test_which_kind_on_which_processor(
    registers: str,
    kernels: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    expected: Made | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: registers)
    monkeypatch.setattr(linear, "_has_kernels", kernels.__contains__)
    assert linear.quicker(dtype) is expected


def test_float32_is_quicker_wherever_torch_has_onednn() -> None:
    assert (linear.quicker(torch.float32) is not None) == torch.backends.mkldnn.is_available()


def test_a_dtype_without_kernels_stays_as_it_is() -> None:
    assert linear.quicker(torch.float64) is None


def test_there_is_one_copy_of_the_weights() -> None:
    for made in (PackedLinear, SplitLinear):
        plain = torch.nn.Linear(512, 320)
        outer = torch.nn.ModuleDict({"large": plain})
        rows = weakref.ref(plain.weight)
        replace(outer, made)
        gc.collect()
        assert plain.weight is None
        assert (rows() is None) == (made is PackedLinear)
        assert sum(p.numel() for p in outer.parameters()) == 512 * 320 + 320
