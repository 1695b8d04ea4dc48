"""Small random models, saved once, and engines that serve them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from engine_support import HIDDEN, LLAMA3_ROPE, SIZES, Reference
from hub_support import OPEN
from local_hub import LocalHub, local_hub
from transformers import LlamaConfig

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a given configuration in a folder."""

    def save(config: Any, **kwargs: Any) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(7)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, **kwargs)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(save_model: Callable[..., Path]) -> Path:
    """A Llama with four query heads per key head and Llama 3's rope scaling, in several files."""
    folder = save_model(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Reference:
    return Reference(llama_folder)


@pytest.fixture
async def engine(llama_folder: Path) -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(llama_folder), max_length=256, max_batch_tokens=2048))
    yield engine
    await engine.aclose()


@pytest.fixture
def hidden() -> torch.Tensor:
    """Three sequences of twelve tokens."""
    return torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A model in one file, of which a span is a part."""
    folder = tmp_path / "served"
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """The hub that huggingface_hub knows; its repository is that model."""
    with local_hub(single) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield hub
        while OPEN:
            OPEN.pop().close()
        huggingface_hub.close_session()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads of a small model in as many steps as those of large ones."""
    monkeypatch.setattr(defaults, "DOWNLOAD_CHUNK_BYTES", 4096)
    monkeypatch.setattr(defaults, "DOWNLOAD_GAP_BYTES", 16)
    monkeypatch.setattr(defaults, "DOWNLOAD_PART_BYTES", 20_000)
    monkeypatch.setattr(defaults, "DISK_RESERVE_BYTES", 0)
