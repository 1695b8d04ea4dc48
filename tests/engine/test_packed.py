"""Linear layers with packed weights, beside torch's own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kwaainet_bridge.engine.packed import PackedLinear, pack, supported


def layers(dtype: torch.dtype, *, bias: bool) -> tuple[torch.nn.Linear, PackedLinear]:
    torch.manual_seed(1)
    plain = torch.nn.Linear(512, 320, bias=bias, dtype=dtype)
    outer = torch.nn.ModuleDict({"large": plain, "small": torch.nn.Linear(8, 8)})
    kept = torch.nn.Linear(512, 320, bias=bias, dtype=dtype)
    kept.load_state_dict(plain.state_dict())
    pack(outer)
    assert type(outer["small"]) is torch.nn.Linear
    return kept, outer["large"]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 129])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_the_linear_layer(tokens: int, dtype: torch.dtype, *, bias: bool) -> None:
    if dtype is torch.bfloat16 and not supported(dtype):
        return  # a processor without them computes with torch's own layers
    plain, packed = layers(dtype, bias=bias)
    assert type(packed) is PackedLinear
    results = []
    for layer in (plain, packed):
        inputs = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
        silent = layer(inputs).detach()
        inputs.requires_grad_()
        output = layer(inputs)
        output.square().sum().backward()
        results.append((silent, output.detach(), inputs.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        assert ours.shape == theirs.shape
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_float32_is_packed_wherever_torch_has_onednn() -> None:
    assert supported(torch.float32) == torch.backends.mkldnn.is_available()


def test_a_dtype_without_kernels_stays_as_it_is() -> None:
    assert not supported(torch.float64)


def test_the_plain_weights_are_let_go_of() -> None:
    plain = torch.nn.Linear(512, 320)
    outer = torch.nn.ModuleDict({"large": plain})
    rows = weakref.ref(plain.weight)
    pack(outer)
    gc.collect()
    assert rows() is None
    assert sum(p.numel() for p in outer.parameters()) == 512 * 320 + 320
