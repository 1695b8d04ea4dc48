"""The part of a model that a client of a swarm runs itself: token embeddings, final norm, head."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kwaainet_bridge.engine.checkpoint import Checkpoint, Download, hub_download
from kwaainet_bridge.engine.config import SUPPORTED_DTYPES, Storage
from kwaainet_bridge.engine.weights.cache import cache_of
from kwaainet_bridge.errors import CheckpointError, InvalidRequest

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Those whose embeddings and logits are exactly these three modules; others scale or cap around them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class ClientModel:
    """Made by :func:`load_client_weights`. Its methods compute where they are called: keep them off an event
    loop.

    ``folder`` holds the tokenizer's files, as ``AutoTokenizer.from_pretrained`` takes them, and ``config``
    is what its config.json says. ``eos_token_ids`` may be empty.
    """

    name: str
    repository: str | None
    folder: Path
    config: Mapping[str, Any]
    family: str
    hidden_size: int
    num_blocks: int
    vocab_size: int
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    _embedding: torch.nn.Module
    _norm: torch.nn.Module
    _head: torch.nn.Module

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] of token ids int64 [B, T]. InvalidRequest for anything else."""
        if ids.dtype != torch.int64 or ids.ndim != 2:
            raise InvalidRequest(
                f"token ids must be int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidRequest(f"token ids must lie in 0..{self.vocab_size - 1}")
        hidden: torch.Tensor = self._embedding(ids)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [..., vocabulary] of the last block's output [..., H]: final norm, then the head.

        Differentiable with regard to ``hidden``. InvalidRequest if that has another size.
        """
        if not hidden.is_floating_point() or hidden.ndim == 0 or hidden.shape[-1] != self.hidden_size:
            raise InvalidRequest(
                f"hidden states must be floating-point [..., {self.hidden_size}], "
                f"got {hidden.dtype} {list(hidden.shape)}"
            )
        return self._head(self._norm(hidden.to(self.dtype))).float()


def load_client_weights(
    model: str,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    revision: str | None = None,
    download: Download = hub_download,
    storage: Storage | None = None,
) -> ClientModel:
    """Read embeddings, final norm and head of a model folder or hub repository, and nothing of its blocks.

    Of a hub repository only they are fetched, to where ``storage`` says, and the tokenizer's files; with another
    ``download`` that fetches whole files. Blocks on disk and network: call it from a worker thread. Raises
    CheckpointError.
    """
    storage = storage or Storage()
    with closing(cache_of(storage)) as cache:
        checkpoint = Checkpoint(
            model,
            revision=revision,
            download=download,
            weights=cache if download is hub_download else None,
            allow_pickled=storage.allow_pickled,
        )
        return _load(checkpoint, dtype)


def _load(checkpoint: Checkpoint, dtype: torch.dtype | Literal["auto"]) -> ClientModel:
    from kwaainet_bridge.engine import family

    model = checkpoint.name
    skeleton = family.build(checkpoint)
    config = skeleton.config
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{model}: no client for model_type {config.model_type}, only for {', '.join(sorted(FAMILIES))}"
        )
    prefix = checkpoint.prefix_of("embed_tokens.weight")
    tied = bool(config.tie_word_embeddings)
    base, head = skeleton.base, skeleton.causal_lm.get_output_embeddings()
    embedding_name, norm_name = prefix + "embed_tokens.weight", prefix + "norm.weight"
    head_name = embedding_name if tied else "lm_head.weight"
    modules = {embedding_name: base.embed_tokens, norm_name: base.norm, head_name: head}
    shapes = {name: list(module.weight.shape) for name, module in modules.items()}
    checkpoint.fetch_tensors(shapes)
    stored = checkpoint.dtype_of(embedding_name)
    chosen = stored if dtype == "auto" else dtype
    if chosen not in SUPPORTED_DTYPES:
        raise CheckpointError(f"{model} cannot be used as {chosen}: choose another dtype")
    tensors = {name: tensor.to(chosen, copy=True) for name, tensor in checkpoint.read(shapes)}
    _assign(base.embed_tokens, tensors[embedding_name])
    _assign(base.norm, tensors[norm_name])
    _assign(head, tensors[head_name])
    for file in TOKENIZER_FILES:
        checkpoint.find(file)
    return ClientModel(
        name=model,
        repository=checkpoint.repository,
        folder=checkpoint.folder,
        config=checkpoint.config,
        family=config.model_type,
        hidden_size=config.hidden_size,
        num_blocks=skeleton.num_blocks,
        vocab_size=config.vocab_size,
        dtype=chosen,
        eos_token_ids=_eos_token_ids(checkpoint),
        _embedding=base.embed_tokens,
        _norm=base.norm,
        _head=head,
    )


def _assign(module: torch.nn.Module, weight: torch.Tensor) -> None:
    module.load_state_dict({"weight": weight}, strict=True, assign=True)
    module.requires_grad_(requires_grad=False)


def _eos_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """What ends a generation: the generation configuration knows best, the model's is older."""
    ids = None
    if checkpoint.find("generation_config.json") is not None:
        ids = checkpoint.json("generation_config.json").get("eos_token_id")
    if ids is None:
        ids = checkpoint.config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(entry for entry in listed if isinstance(entry, int))
