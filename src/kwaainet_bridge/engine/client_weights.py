"""The part of a model that a client of a swarm runs itself: what is before the first block and after the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kwaainet_bridge.engine.checkpoint import Checkpoint, Download, hub_download
from kwaainet_bridge.engine.config import SUPPORTED_DTYPES, Storage
from kwaainet_bridge.engine.weights.cache import cache_of
from kwaainet_bridge.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.ends import Ends

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
    _ends: Ends

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] of token ids int64 [B, T]. InvalidRequest for anything else."""
        if ids.dtype != torch.int64 or ids.ndim != 2:
            raise InvalidRequest(
                f"token ids must be int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidRequest(f"token ids must lie in 0..{self.vocab_size - 1}")
        return self._ends.embed(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [..., vocabulary] of the last block's output [..., H].

        Differentiable with regard to ``hidden``. InvalidRequest if that has another size.
        """
        if not hidden.is_floating_point() or hidden.ndim == 0 or hidden.shape[-1] != self.hidden_size:
            raise InvalidRequest(
                f"hidden states must be floating-point [..., {self.hidden_size}], "
                f"got {hidden.dtype} {list(hidden.shape)}"
            )
        return self._ends.logits(hidden.to(self.dtype)).float()


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
    from kwaainet_bridge.engine.ends import Ends, Unfit

    skeleton = family.build(checkpoint)
    config, num_blocks = skeleton.config, skeleton.num_blocks
    try:
        ends = Ends(skeleton)
        ends.make_buffers()
        chosen = _read(checkpoint, ends, dtype)
        ends.check()
    except Unfit as reason:
        raise CheckpointError(
            f"{checkpoint.name}: no client for model_type {config.model_type}: {reason}"
        ) from reason
    for file in TOKENIZER_FILES:
        checkpoint.find(file)
    return ClientModel(
        name=checkpoint.name,
        repository=checkpoint.repository,
        folder=checkpoint.folder,
        config=checkpoint.config,
        family=config.model_type,
        hidden_size=config.hidden_size,
        num_blocks=num_blocks,
        vocab_size=config.vocab_size,
        dtype=chosen,
        eos_token_ids=_eos_token_ids(checkpoint),
        _ends=ends,
    )


def _read(checkpoint: Checkpoint, ends: Ends, dtype: torch.dtype | Literal["auto"]) -> torch.dtype:
    """Read what the model has beside its blocks, and return the dtype that it has then."""
    causal_lm = ends.causal_lm
    shapes = {name: list(tensor.shape) for name, tensor in causal_lm.state_dict().items()}
    tied = causal_lm.get_expanded_tied_weights_keys()
    names = _stored_names(checkpoint, ends, shapes, tied)
    wanted = {stored: shapes[name] for name, stored in names.items()}
    checkpoint.fetch_tensors(wanted)
    stored_dtype = checkpoint.dtype_of(names[ends.embedding_name])
    chosen = stored_dtype if dtype == "auto" else dtype
    if chosen not in SUPPORTED_DTYPES:
        raise CheckpointError(f"{checkpoint.name} cannot be used as {chosen}: choose another dtype")
    read = {stored: tensor.to(chosen, copy=True) for stored, tensor in checkpoint.read(wanted)}
    tensors = {name: read[stored] for name, stored in names.items()}
    for target, source in tied.items():
        # some checkpoints have both, nearly always with the same values: memory has these once
        if names[target] != names[source] and torch.equal(tensors[target], tensors[source]):
            tensors[target] = tensors[source]
    causal_lm.load_state_dict(tensors, strict=True, assign=True)
    causal_lm.requires_grad_(requires_grad=False)
    return chosen


def _stored_names(
    checkpoint: Checkpoint, ends: Ends, names: Iterable[str], tied: Mapping[str, str]
) -> dict[str, str]:
    """What the checkpoint calls the model's tensors. For a tied one that it does not have: what that is tied to."""
    inside = ends.causal_lm.base_model_prefix + "."
    prefix = checkpoint.prefix_of(ends.embedding_name.removeprefix(inside))

    def stored(name: str) -> str:
        if name.startswith(inside):
            return prefix + name.removeprefix(inside)
        if name in checkpoint:
            return name
        if name in tied:
            return stored(tied[name])
        return checkpoint.prefix_of(name) + name  # the text part of a larger model

    return {name: stored(name) for name in names}


def _eos_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """What ends a generation: the generation configuration knows best, the model's is older."""
    ids = None
    if checkpoint.find("generation_config.json") is not None:
        ids = checkpoint.json("generation_config.json").get("eos_token_id")
    if ids is None:
        ids = checkpoint.config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(entry for entry in listed if isinstance(entry, int))
