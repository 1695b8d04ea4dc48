"""The model that the package carries: small, readable by old and new readers, and trained."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SIZE_LIMIT = 8_000_000  # bytes in the package

# Mansfield Park, chapter 10: held out from training.
HELD_OUT = (
    "A quarter of an hour, twenty minutes, passed away, and Fanny was still thinking of Edmund, Miss Crawford, "
    "and herself, without interruption from any one. She began to be surprised at being left so long, and to "
    "listen with an anxious desire of hearing their steps and their voices again. She listened, and at length "
    "she heard; she heard voices and feet approaching; but she had just satisfied herself that it was not those "
    "she wanted, when Miss Bertram, Mr. Rushworth, and Mr. Crawford issued from the same path which she had trod "
    "herself, and were before her."
)
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "Emma Woodhouse, handsome, clever, and rich, with a",
    '"My dear Mr. Bennet," said his lady to him one day,',
)
ROUND_TRIPS = (*PROMPTS, HELD_OUT, "  two  spaces\n\nand newlines -- £5, naïve 日本 !", " leading", "")
NEW_TOKENS = 40

# Run by the environment of the stock peers, which has transformers 4.34.1 and knows nothing of this package.
STOCK_READER = """
import json, sys, torch, transformers
folder, job = sys.argv[1], json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
ids = [tokenizer(text)["input_ids"] for text in job["texts"]]
greedy = [
    model.generate(torch.tensor([tokenizer(text)["input_ids"]]), max_new_tokens=job["new"], do_sample=False)[0].tolist()
    for text in job["prompts"]
]
decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
print(json.dumps({"version": transformers.__version__, "ids": ids, "decoded": decoded, "greedy": greedy}))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with as_file(files("kwaainet_bridge") / "models" / "austen") as path:
        yield path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return model(input_ids=ids, labels=ids).loss.item()


def test_it_is_small(folder: Path) -> None:
    assert sum(p.stat().st_size for p in folder.iterdir()) <= SIZE_LIMIT


def test_config_is_in_the_format_that_transformers_4_34_reads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "bfloat16")
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_hidden_layers"] % 2 == 0  # two nodes hold half of the blocks each
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_predicts_text_that_it_never_saw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(HELD_OUT, return_tensors="pt")["input_ids"]
    assert mean_loss(model, ids) < 4.0 < math.log(model.config.vocab_size) / 1.8


def test_it_does_not_predict_the_same_tokens_in_any_order(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(HELD_OUT, return_tensors="pt")["input_ids"]
    order = torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = torch.cat([ids[:, :1], ids[:, order]], dim=1)
    assert mean_loss(model, shuffled) > mean_loss(model, ids) + 2.0


def test_greedy_text_is_made_of_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Most words are such as the novels use often: those that the vocabulary holds in one piece."""
    vocabulary = tokenizer.get_vocab()
    words: list[str] = []
    for prompt in PROMPTS:
        text = tokenizer.decode(greedy(model, tokenizer, prompt), skip_special_tokens=True)
        assert text.startswith(prompt)
        words += re.findall(r"[A-Za-z]+", text.removeprefix(prompt))
    frequent = [word for word in words if f"Ġ{word}" in vocabulary or word in vocabulary]
    assert len(words) > 0.5 * NEW_TOKENS * len(PROMPTS)
    assert len(frequent) > 0.8 * len(words), words
    assert len(set(words)) > 25, words


@pytest.mark.interop
def test_transformers_4_34_reads_it_alike(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    peers = Path(os.environ.get("KWAAINET_BRIDGE_PEERS", Path(__file__).resolve().parents[2] / ".venv-peers"))
    answer = subprocess.run(
        [peers / "bin" / "python", "-W", "ignore", "-c", STOCK_READER, folder],
        input=json.dumps({"texts": ROUND_TRIPS, "prompts": PROMPTS, "new": NEW_TOKENS}),
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    stock = json.loads(answer.stdout.splitlines()[-1])
    assert stock["version"] == "4.34.1"
    assert stock["ids"] == [tokenizer(text)["input_ids"] for text in ROUND_TRIPS]
    assert stock["decoded"] == list(ROUND_TRIPS)
    assert stock["greedy"] == [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
