"""Reading model folders and repositories, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trio
from engine_support import BLOCKS, SIZES, Reference, close
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress, ModelInfo
from kwaainet_bridge.engine.checkpoint import Checkpoint
from kwaainet_bridge.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def single_folder(save_model: Callable[..., Path]) -> Path:
    return save_model(LlamaConfig(**SIZES))


@pytest.fixture
def copy(single_folder: Path, tmp_path: Path) -> Path:
    """A model of one file that a test may spoil."""
    return shutil.copytree(single_folder, tmp_path / "model")


@pytest.fixture
def sharded(llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "sharded")


async def load(folder: Path | str, **kwargs: object) -> Engine:
    return await Engine.load(EngineConfig(str(folder), **kwargs))  # type: ignore[arg-type]


async def test_a_single_file(single_folder: Path, hidden: torch.Tensor) -> None:
    engine = await load(single_folder)
    close(await engine.forward(hidden, engine.blocks), Reference(single_folder)(hidden))
    await engine.aclose()


async def test_only_the_files_of_the_span_are_read(
    sharded: Path, hidden: torch.Tensor, llama: Reference
) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if ".layers.2." in name or ".layers.3." in name}
    for file in set(weight_map.values()) - needed:
        (sharded / file).unlink()
    engine = await load(sharded, blocks=range(2, 4))
    assert engine.blocks == range(2, 4)
    assert engine.model.num_blocks == BLOCKS
    output = await engine.forward(hidden, range(2, 4))
    assert output.shape == hidden.shape
    await engine.aclose()
    with pytest.raises(
        CheckpointError, match=r"has no model-\d+-of-\d+\.safetensors: the model is incomplete"
    ):
        await load(sharded)


async def test_names_without_the_models_prefix(copy: Path, single_folder: Path, hidden: torch.Tensor) -> None:
    """As a bare base model is saved."""
    tensors = load_file(copy / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(stripped, copy / "model.safetensors")
    engine = await load(copy)
    close(await engine.forward(hidden, engine.blocks), Reference(single_folder)(hidden))
    await engine.aclose()


async def test_progress_and_description(llama_folder: Path) -> None:
    seen: list[LoadProgress] = []
    described: list[tuple[ModelInfo, range]] = []
    engine = await Engine.load(
        EngineConfig(str(llama_folder), blocks=range(1, 3)),
        progress=seen.append,
        on_described=lambda model, blocks: described.append((model, blocks)),
    )
    assert described == [(engine.model, range(1, 3))]
    assert [progress.blocks_done for progress in seen] == [0, 1, 2]
    assert seen[-1].bytes_done == seen[-1].bytes_total == 2 * 4 * sum(_block_sizes())
    assert not any(progress.missing_bytes for progress in seen)  # nothing was to be fetched
    model = engine.model
    assert (model.name, model.repository, model.family) == (str(llama_folder), None, "llama")
    assert (model.hidden_size, model.num_blocks, model.vocab_size) == (64, BLOCKS, 128)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (8, 2, 16)
    assert model.dtype == torch.float32
    await engine.aclose()


def _block_sizes() -> list[int]:
    attention = 64 * 128 + 2 * 64 * 32 + 128 * 64
    return [attention, 3 * 64 * 96, 2 * 64]


async def test_a_cancelled_load_leaves_nothing(llama_folder: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with trio.CancelScope() as scope:
        await Engine.load(EngineConfig(str(llama_folder)), progress=lambda _progress: scope.cancel())
    assert scope.cancelled_caught
    assert "compute" not in {thread.name for thread in threading.enumerate()} - before


async def test_a_failed_load_leaves_no_thread(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has no tensor model\.layers\.4\.mlp\.up_proj\.weight: .*incomplete"
    ):
        await load(copy)
    assert "compute" not in {thread.name for thread in threading.enumerate()}


async def test_blocks_that_the_model_does_not_have(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="has blocks 0:6"):
        await load(llama_folder, blocks=range(4, 8))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
async def test_a_device_that_is_not_there(llama_folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device {device} cannot be used"):
        await load(llama_folder, device=device)


async def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a model folder nor a repository id"):
        await load(tmp_path / "nothing" / "here")


async def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        await load(tmp_path)


async def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        await load(copy)


async def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        await load(copy)


async def test_a_file_cut_short(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        await load(copy)


async def test_an_index_that_lies(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = "model.layers.0.mlp.up_proj.weight"
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is not in .*, where the index puts it"):
        await load(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, {"a": "../outside.safetensors"}])
def test_an_index_that_is_none(sharded: Path, weight_map: object) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        Checkpoint(str(sharded))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_configuration_that_is_none(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(str(copy))


async def test_weights_of_another_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has shape \[96, 64\], the configuration says \[100, 64\]"):
        await load(copy)


async def test_integer_weights(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight in .* is stored as torch\.int8: quantised"):
        await load(copy)


class Hub:
    """A repository in a folder: what is asked for is put into a snapshot, and noted."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.snapshot = cache / self.COMMIT
        self.snapshot.mkdir()
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, repository: str, file: str, revision: str | None) -> Path | None:
        assert repository == "org/tiny"
        self.asked.append((file, revision))
        if not (self.source / file).is_file():
            return None
        return Path(shutil.copy(self.source / file, self.snapshot / file))


async def test_a_repository_gives_only_what_is_needed(
    llama_folder: Path, tmp_path: Path, hidden: torch.Tensor
) -> None:
    hub = Hub(llama_folder, tmp_path)
    engine = await Engine.load(EngineConfig("org/tiny", blocks=range(1), revision="main"), download=hub)
    assert engine.model.repository == "org/tiny"
    await engine.forward(hidden, range(1))
    await engine.aclose()
    weights = [file for file, _ in hub.asked if file.endswith(".safetensors")]
    index = json.loads((llama_folder / "model.safetensors.index.json").read_text())
    assert 0 < len(weights) < len(set(index["weight_map"].values())) / 2
    assert hub.asked[0] == ("config.json", "main")
    # the branch may move meanwhile: all the rest comes from the commit that the first file came from
    assert {revision for _, revision in hub.asked[1:]} == {Hub.COMMIT}


def test_a_repository_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"org/tiny has no config\.json"):
        Checkpoint("org/tiny", download=Hub(tmp_path, tmp_path))
