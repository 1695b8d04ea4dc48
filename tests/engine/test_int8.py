"""Linear layers and whole models in eight bits, beside the exact ones."""

from __future__ import annotations

import gc
import weakref
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from engine_support import Reference, at_once
from torch.nn.functional import linear

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine import int8 as module
from kwaainet_bridge.engine.int8 import Int8Linear, input_levels, quantise
from kwaainet_bridge.errors import ConfigError

ERROR = 0.015
"""Of a matrix' output, relative, by norms; 0.010 was measured."""


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(((left - right).detach().norm(dim=-1) / right.detach().norm(dim=-1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [127, 63])
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
    quantise(outer)
    gc.collect()
    assert rows() is None
    assert isinstance(outer["large"], Int8Linear)
    assert type(outer["small"]) is torch.nn.Linear
    assert sum(p.numel() * p.element_size() for p in outer["large"].parameters()) == 512 * 320


def test_inputs_have_seven_bits_where_products_could_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, levels in ((True, 127), (False, 63)):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda answer=supported: answer)
        assert input_levels() == levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large enough."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "wide"
    torch.manual_seed(5)
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def test_a_model_in_eight_bits(folder: Path) -> None:
    """Steps, passes and gradients are near the exact ones; batches are as good as steps alone; memory is measured."""
    whole = Reference(folder)
    hidden = torch.randn(2, 12, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = whole(hidden)
    (gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    plain = await Engine.load(EngineConfig(str(folder)))
    async with aclosing(plain):
        exact_bytes = plain.weights_bytes
    engine = await Engine.load(EngineConfig(str(folder), quantization="int8"))
    async with aclosing(engine):
        assert 0.25 <= engine.weights_bytes / exact_bytes < 0.28
        hidden = hidden.detach()
        expected = expected.detach()
        assert distance(await engine.forward(hidden, engine.blocks), expected) < 0.03
        ours, _ = await engine.backward(hidden, 2 * expected, engine.blocks)
        assert distance(ours.flatten(1), gradient.flatten(1)) < 0.05
        async with (
            engine.open_session(engine.blocks, 2, 32) as one,
            engine.open_session(engine.blocks, 2, 32) as two,
        ):
            first, again = await at_once(
                engine, lambda: one.step(hidden[:, :9]), lambda: two.step(hidden[:, :9])
            )
            assert torch.equal(first, again)
            last = await one.step(hidden[:, 9:])
            assert distance(last, expected[:, 9:]) < 0.03


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"tensor_parallel": 2}, "quantization does not go with tensor_parallel")],
)
def test_what_does_not_go_with_it(options: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EngineConfig("model", quantization="int8", **options)  # type: ignore[arg-type]


def test_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8 is for CPUs with oneDNN, and the device is cuda:0"):
        module.check(torch.device("cuda:0"))
