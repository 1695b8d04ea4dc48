"""Linear layers of bitsandbytes, which run on CPUs too, and whole models with fewer bits, beside the exact ones."""

from __future__ import annotations

import sys
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
import transformers
from adapter_files import make_adapter, merged
from engine_support import Reference, at_once
from family_models import save
from torch.nn.functional import linear

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.int8 import Int8Linear, input_levels
from kwaainet_bridge.engine.linear import quicker
from kwaainet_bridge.engine.quantized import MixedInt8Linear, Nf4Linear, check, quantise
from kwaainet_bridge.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
ERRORS = {Nf4Linear: 0.12, MixedInt8Linear: 0.015}
"""Of a matrix' output, relative, by norms; 0.092 and 0.009 were measured."""
BITS = {Nf4Linear: 4.2, MixedInt8Linear: 8.2}
"""Of a weight, with its share of the scales."""
OF_MODEL = {"int8": (0.015 * 127 / input_levels(), 0.26), "nf4": (0.1, 0.14)}
"""Of a model of three blocks: distance of its output, and half of that of gradients, which grow as levels are fewer;
memory beside that in float32."""


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left.detach().float().flatten(0, -2), right.detach().float().flatten(0, -2)
    return float(((left - right).norm(dim=-1) / right.norm(dim=-1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(ERRORS))
def test_layers_are_nearly_the_linear_layer(
    kind: type[torch.nn.Module], dtype: torch.dtype, *, bias: bool
) -> None:
    torch.manual_seed(1)
    plain = torch.nn.Linear(512, 320, bias=bias, dtype=dtype)
    weight = plain.weight.detach().clone()
    layer = kind(plain)
    held = [*layer.parameters(), *layer.buffers()]
    values = sum(t.numel() * t.element_size() for t in held if t is not plain.bias)
    assert values * 8 / weight.numel() < BITS[kind]
    inputs = torch.randn(2, 9, 512).to(dtype).requires_grad_()
    expected = linear(inputs, weight, plain.bias)
    output = layer(inputs)
    assert output.dtype is dtype
    assert distance(output, expected) < ERRORS[kind]
    target = torch.randn(2, 9, 320).to(dtype)
    (ours,) = torch.autograd.grad((output * target).sum(), inputs)
    (theirs,) = torch.autograd.grad((expected * target).sum(), inputs)
    assert distance(ours, theirs) < ERRORS[kind]
    with torch.no_grad():
        assert distance(layer(inputs), expected) < ERRORS[kind]


def test_large_inputs_do_not_drown_the_others_where_columns_are_taken_out() -> None:
    torch.manual_seed(1)
    plain = torch.nn.Linear(512, 320, bias=False)
    inputs = torch.randn(1, 5, 512)
    inputs[:, :, 7] = 100.0
    plain.weight.data[:, 7] = 0  # what is large is of no effect, what it would drown is
    expected = linear(inputs, plain.weight.detach())
    with torch.no_grad():
        assert distance(MixedInt8Linear(plain)(inputs), expected) < 0.02
        assert distance(Int8Linear(plain)(inputs), expected) > 0.1


def test_which_layers_are_quantised() -> None:
    outer = torch.nn.ModuleDict(
        {
            "large": torch.nn.Linear(512, 320),
            "small": torch.nn.Linear(64, 64),
            "odd": torch.nn.Linear(520, 320),
            "other": torch.nn.Bilinear(64, 64, 64),
        }
    )
    assert quantise("nf4", outer, CPU) == 512 * 320
    assert [type(layer).__name__ for layer in outer.values()] == ["Nf4Linear", "Linear", "Linear", "Bilinear"]


def save_wide(folder: Path, **sizes: int) -> Path:
    """A model whose matrices are large enough."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 64} | sizes
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("models") / "wide")


@pytest.mark.parametrize("kind", OF_MODEL)
async def test_a_model_with_fewer_bits(folder: Path, kind: str) -> None:
    """Steps, passes and gradients are near the exact ones; batches are as good as steps alone; memory is measured."""
    most, share = OF_MODEL[kind]
    whole = Reference(folder)
    hidden = torch.randn(2, 12, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = whole(hidden)
    (gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    exact_bytes = sum(t.numel() * 4 for layer in whole.layers for t in layer.state_dict().values())
    hidden, expected = hidden.detach(), expected.detach()
    engine = await Engine.load(EngineConfig(str(folder), quantization=kind))
    async with aclosing(engine):
        assert engine.weights_bytes / exact_bytes < share
        assert distance(await engine.forward(hidden, engine.blocks), expected) < most
        ours, _ = await engine.backward(hidden, 2 * expected, engine.blocks)
        assert distance(ours, gradient) < 2 * most
        async with (
            engine.open_session(engine.blocks, 2, 32) as one,
            engine.open_session(engine.blocks, 2, 32) as two,
        ):
            first, again = await at_once(
                engine, lambda: one.step(hidden[:, :9]), lambda: two.step(hidden[:, :9])
            )
            assert torch.equal(first, again)
            assert distance(await one.step(hidden[:, 9:]), expected[:, 9:]) < most


@pytest.mark.parametrize("kind", OF_MODEL)
async def test_adapters_on_quantised_layers(folder: Path, tmp_path: Path, kind: str) -> None:
    """What an adapter adds is not quantised; a session without it, in the same batch, has nothing of it."""
    adapter = make_adapter(tmp_path / "one", folder, lora_alpha=8)
    plain, changed = Reference(folder), merged(folder, adapter, 8 / 4)
    hidden = torch.randn(1, 8, 512, generator=torch.Generator().manual_seed(1))
    assert distance(plain(hidden), changed(hidden)) > 2 * OF_MODEL[kind][0]
    engine = await Engine.load(EngineConfig(str(folder), quantization=kind, adapters=(str(adapter),)))
    async with (
        aclosing(engine),
        engine.open_session(engine.blocks, 1, 16) as without,
        engine.open_session(engine.blocks, 1, 16, adapter="one") as adapted,
    ):
        outputs = await at_once(engine, lambda: without.step(hidden), lambda: adapted.step(hidden))
        for whole, output in zip((plain, changed), outputs, strict=True):
            assert distance(output, whole(hidden)) < OF_MODEL[kind][0]
        inputs = hidden.clone().requires_grad_()
        expected = changed(inputs)
        (gradient,) = torch.autograd.grad(expected.square().sum(), inputs)
        ours, _ = await engine.backward(hidden, 2 * expected.detach(), engine.blocks, adapter="one")
        assert distance(ours, gradient) < 2 * OF_MODEL[kind][0]


async def test_what_stays_plain_is_computed_quickly(tmp_path: Path) -> None:
    """Rows that are no multiple of a block of four bits."""
    save_wide(tmp_path / "odd", intermediate_size=520)
    engine = await Engine.load(EngineConfig(str(tmp_path / "odd"), blocks=range(1), quantization="nf4"))
    async with aclosing(engine):
        layer = engine._span._layers[0]
        assert isinstance(layer.mlp.up_proj, Nf4Linear)
        assert type(layer.mlp.down_proj) is (quicker(torch.float32) or torch.nn.Linear)


async def test_a_model_of_which_little_would_be_quantised_is_refused(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"in block 0 large linear layers have 0% of the weights; set model"
    ):
        await Engine.load(EngineConfig(str(tmp_path / "model"), quantization="int8"))


async def test_a_library_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes .* pip install 'kwaainet-bridge\[quantized\]'"
    ):
        await Engine.load(EngineConfig(str(folder), quantization="nf4"))
    check("int8", CPU)  # needs nothing more


def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nf4 is for cpu and cuda, not for mps: set it to none"):
        check("nf4", torch.device("mps"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="int8 on a CPU needs oneDNN"):
        check("int8", CPU)
    check("none", torch.device("mps"))


def test_it_does_not_go_with_several_processes() -> None:
    with pytest.raises(ConfigError, match="quantization does not go with tensor_parallel"):
        EngineConfig("model", quantization="int8", tensor_parallel=2)
