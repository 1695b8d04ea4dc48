"""Small random models, saved once, and engines that serve them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_support import HIDDEN, LLAMA3_ROPE, SIZES, Reference
from transformers import LlamaConfig

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
