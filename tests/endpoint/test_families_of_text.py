"""``generate`` and the OpenAI endpoint with models that do more than look up, norm and multiply at their ends."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from node_support import node_config, running_node

from kwaainet_bridge.cli.generate import GenerateOptions, generate_text

AUSTEN = Path(__file__).parents[2] / "src" / "kwaainet_bridge" / "models" / "austen"
PROMPT, TOKENS = "She was", 12
SIZES = {"hidden_size": 64, "initializer_range": 0.1}
CONFIGS = {
    "gemma2": lambda size: transformers.Gemma2Config(
        **SIZES,
        vocab_size=size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    ),
    "bloom": lambda size: transformers.BloomConfig(**SIZES, vocab_size=size, n_layer=2, n_head=4),
}


def save(name: str, folder: Path) -> str:
    """A random model with the tokenizer of the embedded one; its greedy text behind the prompt."""
    torch.manual_seed(7)
    for file in AUSTEN.glob("token*"):
        shutil.copy(file, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer))).eval()
    model.config.eos_token_id = None
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    new = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", CONFIGS)
async def test_text_of_a_node_by_both_ways(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1)
    model = tmp_path / name
    model.mkdir()
    expected = save(name, model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    section = {"name": str(model), "dht_prefix": name, "throughput": 1.0, "threads": 1}
    config = node_config(tmp_path, "node", model=section, openai={"listen": f"127.0.0.1:{port}"})
    async with running_node(config) as node:
        await node.serving()
        capsys.readouterr()
        visitor = node_config(tmp_path, "visitor", bootstrap=[node.address], model=section)
        await generate_text(visitor, GenerateOptions(PROMPT, max_new_tokens=TOKENS))
        assert capsys.readouterr().out.strip("\n") == PROMPT + expected
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as client:
            asked = {"model": str(model), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
            answer = (await client.post("/completions", json=asked)).json()
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == TOKENS
