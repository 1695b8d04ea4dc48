"""Writes a Llama of random weights, about 107 million parameters, as the stock transformers save it.

Run with the stock environment's python: ``random_llama.py FOLDER``.
"""

from __future__ import annotations

import sys

import torch
import transformers


def main(folder: str) -> None:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.03,
        torch_dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(
        folder, max_shard_size="100MB", safe_serialization=True
    )


if __name__ == "__main__":
    main(sys.argv[1])
