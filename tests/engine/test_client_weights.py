"""Embeddings, final norm and head, as a client loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tr
from engine_support import BLOCKS, HIDDEN, SIZES, VECTORS

from kwaainet_bridge.engine import load_client_weights
from kwaainet_bridge.errors import InvalidRequest

IDS = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [tr.LlamaConfig, tr.Qwen2Config, tr.Qwen3Config, tr.MistralConfig])
def test_both_ends_are_the_models(config: type, tied: bool, save_model: Callable[..., Path]) -> None:
    folder = save_model(config(**SIZES, tie_word_embeddings=tied))
    model = tr.AutoModelForCausalLM.from_pretrained(folder).requires_grad_(requires_grad=False)
    client = load_client_weights(str(folder))

    hidden = client.embed(IDS)
    outputs: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    expected = model(inputs_embeds=hidden).logits

    assert torch.equal(hidden, model.model.embed_tokens(IDS))
    assert torch.equal(client.logits(outputs[0]), expected)
    assert (client.hidden_size, client.num_blocks, client.vocab_size) == (HIDDEN, BLOCKS, 128)
    assert client.family == model.config.model_type


def test_files_of_blocks_alone_are_not_needed(tmp_path: Path) -> None:
    folder = shutil.copytree(VECTORS / "model", tmp_path / "model")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if ".layers." not in name}
    removed = [path for path in folder.glob("*.safetensors") if path.name not in needed]
    assert removed
    for path in removed:
        path.unlink()
    client = load_client_weights(str(folder), dtype=torch.bfloat16)
    assert client.dtype == torch.bfloat16
    assert client.embed(IDS).dtype == torch.bfloat16
    assert client.logits(torch.zeros(2, 1, 64)).dtype == torch.float32
    assert client.eos_token_ids == {2}
    assert (client.folder / "tokenizer.model").is_file()


def test_several_ends_of_text(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_client_weights(str(folder)).eos_token_ids == {3, 5}


def test_logits_can_be_differentiated(llama_folder: Path) -> None:
    hidden = torch.randn(1, 2, HIDDEN, requires_grad=True)
    load_client_weights(str(llama_folder)).logits(hidden).sum().backward()
    assert hidden.grad is not None


def test_what_does_not_fit_is_refused(llama_folder: Path) -> None:
    client = load_client_weights(str(llama_folder))
    with pytest.raises(InvalidRequest, match=r"token ids must lie in 0\.\.127"):
        client.embed(torch.tensor([[128]]))
    with pytest.raises(InvalidRequest, match="token ids must be int64"):
        client.embed(torch.tensor([1]))
    with pytest.raises(InvalidRequest, match=r"must be floating-point \[\.\.\., 64\]"):
        client.logits(torch.zeros(2, 63))
