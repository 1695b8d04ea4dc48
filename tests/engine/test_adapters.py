"""LoRA adapters: what they add, to whom, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import LLAMA, make_adapter, merged, write_adapter
from engine_support import Reference, at_once, close
from family_models import BLOCKS, random_hidden, save

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.lora import AdaptedLinear
from kwaainet_bridge.errors import CheckpointError, ConfigError, InvalidRequest

ALL = range(BLOCKS)
STEM = "base_model.model.model.layers"


@asynccontextmanager
async def adapted(model: Path, *adapters: Path) -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(model), adapters=tuple(map(str, adapters))))
    async with aclosing(engine):
        yield engine


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama3.1", LLAMA),
        ("bloom", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ("gemma3", ("self_attn.k_proj", "mlp.gate_proj")),
    ],
)
async def test_sessions_with_and_without_adapters_share_batches(
    family: str, modules: tuple[str, ...], tmp_path: Path
) -> None:
    """Each gets what the model with its own adapter merged into the weights gives; so do passes and gradients."""
    model = tmp_path / "model"
    save(family, model)
    one = make_adapter(tmp_path / "one", model, modules)
    two = make_adapter(tmp_path / "two", model, modules[:1], rank=2, seed=2, use_rslora=True)
    wholes = {
        None: Reference(model),
        "one": merged(model, one, 16 / 4),
        "two": merged(model, two, 16 / 2**0.5),
    }
    hidden = random_hidden(2, 20)
    assert (wholes[None](hidden) - wholes["one"](hidden)).abs().max() > 0.01
    async with adapted(model, one, two) as engine:
        assert engine.adapters == ("one", "two")
        for name, whole in wholes.items():
            inputs = hidden.clone().requires_grad_()
            expected = whole(inputs)
            (gradient,) = torch.autograd.grad(expected.square().sum(), inputs)
            close(await engine.forward(hidden, ALL, adapter=name), expected.detach())
            ours, _ = await engine.backward(hidden, 2 * expected.detach(), ALL, adapter=name)
            close(ours, gradient, 1e-4)
        async with (
            engine.open_session(ALL, 2, 64, adapter="one") as first,
            engine.open_session(ALL, 2, 64) as plain,
            engine.open_session(ALL, 2, 64, adapter="two") as second,
        ):
            sessions = {"one": first, None: plain, "two": second}
            for start, end in ((0, 9), (9, 10), (10, 13)):
                part = hidden[:, start:end]
                outputs = await at_once(
                    engine,
                    *(lambda s=session: s.step(part) for session in sessions.values()),  # noqa: B023
                )
                for name, output in zip(sessions, outputs, strict=True):
                    close(output, wholes[name](hidden[:, :end])[:, start:])


async def test_a_long_prompt_with_an_adapter(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    one = make_adapter(tmp_path / "one", tmp_path / "model")
    hidden = random_hidden(1, 300)
    async with (
        adapted(tmp_path / "model", one) as engine,
        engine.open_session(ALL, 1, 300, adapter="one") as session,
    ):
        close(await session.step(hidden), merged(tmp_path / "model", one, 4.0)(hidden))


async def test_alpha_by_module(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    one = make_adapter(tmp_path / "one", tmp_path / "model", LLAMA[:1], alpha_pattern={"q_proj": 2})
    hidden = random_hidden(1, 5)
    async with adapted(tmp_path / "model", one) as engine:
        close(
            await engine.forward(hidden, ALL, adapter="one"), merged(tmp_path / "model", one, 2 / 4)(hidden)
        )


async def test_only_layers_that_change_are_wrapped(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    one = make_adapter(tmp_path / "one", tmp_path / "model", LLAMA[:1])
    async with adapted(tmp_path / "model", one) as engine:
        layers = engine._span._layers
        wrapped = {
            (block, name)
            for block, layer in layers.items()
            for name, module in layer.named_modules()
            if isinstance(module, AdaptedLinear)
        }
    assert wrapped == {(block, "self_attn.q_proj") for block in range(1, BLOCKS)}


async def test_an_unknown_adapter_is_refused(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    async with adapted(tmp_path / "model") as engine:
        with pytest.raises(InvalidRequest, match="adapter else not found"):
            await engine.forward(random_hidden(1, 2), ALL, adapter="else")
        with pytest.raises(InvalidRequest, match="adapter else not found"):
            async with engine.open_session(ALL, 1, 8, adapter="else"):
                pass


WRONG: dict[str, tuple[dict[str, Any], dict[str, list[int]], str]] = {
    "another kind": ({"peft_type": "IA3"}, {}, "it is no LoRA adapter"),
    "DoRA": ({"use_dora": True}, {}, "it is a DoRA adapter"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, {}, "it replaces whole modules"),
    "biases": ({"bias": "all"}, {}, "it changes biases"),
    "no alpha": ({"lora_alpha": None}, {}, "lora_alpha is None"),
    "other tensors": ({}, {f"{STEM}.0.self_attn.q_proj.lora_magnitude_vector": [4]}, "no matrix of LoRA"),
    "one matrix": ({}, {f"{STEM}.0.self_attn.q_proj.lora_A.weight": [4, 64]}, "one of its two matrices"),
    "two ranks": (
        {},
        {
            f"{STEM}.0.self_attn.q_proj.lora_A.weight": [4, 64],
            f"{STEM}.0.self_attn.q_proj.lora_B.weight": [64, 3],
        },
        "have shapes",
    ),
    "another model": (
        {},
        {
            f"{STEM}.1.self_attn.q_proj.lora_A.weight": [4, 32],
            f"{STEM}.1.self_attn.q_proj.lora_B.weight": [64, 4],
        },
        r"q_proj of block 1 has the shape \[64, 64\], the adapter is for \[64, 32\]",
    ),
    "no block at all": (
        {},
        {"base_model.model.lm_head.lora_A.weight": [4, 64]},
        "it changes no layer of any block",
    ),
    "a deeper model": (
        {},
        {
            f"{STEM}.{BLOCKS}.self_attn.q_proj.lora_A.weight": [4, 64],
            f"{STEM}.{BLOCKS}.self_attn.q_proj.lora_B.weight": [64, 4],
        },
        f"it changes block {BLOCKS}, and the model has blocks 0:{BLOCKS}",
    ),
    "no such module": (
        {},
        {f"{STEM}.1.attn.q.lora_A.weight": [4, 64], f"{STEM}.1.attn.q.lora_B.weight": [64, 4]},
        "attn.q of block 1 does not exist in this model",
    ),
    "no linear layer": (
        {},
        {
            f"{STEM}.1.input_layernorm.lora_A.weight": [4, 64],
            f"{STEM}.1.input_layernorm.lora_B.weight": [64, 4],
        },
        "no linear layer but LlamaRMSNorm",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_cannot_be_served_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, shapes, reason = WRONG[name]
    save("llama3.1", tmp_path / "model")
    write_adapter(tmp_path / "bad", {key: torch.zeros(shape) for key, shape in shapes.items()}, **config)
    with pytest.raises(CheckpointError, match=f"adapter bad cannot be served: .*{reason}"):
        async with adapted(tmp_path / "model", tmp_path / "bad"):
            pass


async def test_files_that_are_missing(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"adapter empty cannot be served: adapter_config\.json cannot be read"
    ):
        async with adapted(tmp_path / "model", tmp_path / "empty"):
            pass
    with pytest.raises(CheckpointError, match="neither a folder nor a repository id"):
        async with adapted(tmp_path / "model", tmp_path / "a b"):
            pass


async def test_a_repository_is_fetched(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    one = make_adapter(tmp_path / "one", tmp_path / "model")
    asked = []

    def download(repository: str, file: str, revision: str | None) -> Path | None:
        asked.append((repository, file, revision))
        return one / file

    config = EngineConfig(str(tmp_path / "model"), adapters=("org/name",))
    engine = await Engine.load(config, download=download)
    async with aclosing(engine):
        assert engine.adapters == ("org/name",)
        assert asked == [
            ("org/name", name, None) for name in ("adapter_config.json", "adapter_model.safetensors")
        ]


def test_two_of_one_name(tmp_path: Path) -> None:
    from kwaainet_bridge.engine import names_of

    for parent in ("a", "b"):
        (tmp_path / parent / "same").mkdir(parents=True)
    with pytest.raises(ConfigError, match="two are called same: rename the folder"):
        names_of([str(tmp_path / parent / "same") for parent in ("a", "b")])


def test_adapters_do_not_go_with_several_processes() -> None:
    with pytest.raises(ConfigError, match="adapters do not go with tensor_parallel"):
        EngineConfig("model", adapters=("one",), tensor_parallel=2)


async def test_two_of_one_name_leave_nothing_in_memory(tmp_path: Path) -> None:
    save("llama3.1", tmp_path / "model")
    adapters = [make_adapter(tmp_path / parent / "same", tmp_path / "model") for parent in ("a", "b")]
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="two are called same"):
        await Engine.load(EngineConfig(str(tmp_path / "model"), adapters=tuple(map(str, adapters))))
    left = set(threading.enumerate()) - before
    assert "compute" not in {thread.name for thread in left}
