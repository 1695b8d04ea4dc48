"""A span of a Llama model in plain transformers code: float32 inside, float16 at its ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sim_records import prefix_of
from transformers import AutoModelForCausalLM, DynamicCache

import kwaainet_bridge

SESSION_IDLE_SECONDS = 600.0


@dataclass(frozen=True)
class Model:
    """A model folder and the repository that it is announced as."""

    folder: Path
    repository: str
    num_blocks: int

    @property
    def prefix(self) -> str:
        return prefix_of(self.repository)


TINY = Model(Path(__file__).parents[1] / "vectors/petals-tiny-llama/model", "kwaai/tiny-llama.v1", 8)
AUSTEN = Model(Path(kwaainet_bridge.__file__).parent / "models/austen", "kwaai/austen", 8)


@functools.lru_cache(maxsize=16)
def load_whole(model: Model) -> Any:
    """The whole model in float32; the caller does not change it."""
    return AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()


@functools.lru_cache(maxsize=16)
def load_span(model: Model, start: int, stop: int) -> Any:
    """The model with the blocks from ``start`` to before ``stop`` alone, numbered from 0."""
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    inner = whole.model
    inner.layers = inner.layers[start:stop]
    inner.config.num_hidden_layers = stop - start
    for index, layer in enumerate(inner.layers):
        layer.self_attn.layer_idx = index
    if stop != model.num_blocks:
        inner.norm = torch.nn.Identity()
    return whole


def to_half(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float16).numpy()


def from_half(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


class OutOfPlace(Exception):
    """A position that is not where the session is."""


@dataclass
class _Session:
    cache: Any
    used_at: float
    length: int = 0


@dataclass
class Span:
    """Blocks ``blocks`` of ``model`` with their sessions, which have bare numbers for names.

    Position 0 opens a session, in the place of one with its number if there is one. Sessions that were idle for 600 s are gone.
    """

    model: Model
    blocks: range
    clock: Callable[[], float]
    sessions: dict[int, _Session] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        return self.blocks.start == 0

    @property
    def last(self) -> bool:
        return self.blocks.stop == self.model.num_blocks

    @torch.inference_mode()
    def step(self, session_id: int, position: int, given: list[int] | np.ndarray) -> np.ndarray:
        """Run token ids, or hidden states ``[1, seq, hidden]``, at ``position``.

        Returns float16: hidden states of the same length, or ``[1, 1, vocab]`` of the last token from the last span.
        """
        lm = load_span(self.model, self.blocks.start, self.blocks.stop)
        if isinstance(given, list):
            if not given or max(given) >= lm.config.vocab_size:
                raise ValueError(f"no token ids below {lm.config.vocab_size}: {given!r:.60}")
            embedded = lm.model.embed_tokens(torch.tensor([given]))
        else:
            if given.ndim != 3 or given.shape[0] != 1 or given.shape[2] != lm.config.hidden_size:
                raise ValueError(f"hidden states of shape {list(given.shape)}")
            embedded = from_half(given)
        session = self._session(session_id, position, lm.config)
        hidden = lm.model(
            inputs_embeds=embedded, past_key_values=session.cache, use_cache=True
        ).last_hidden_state
        session.length += embedded.shape[1]
        return to_half(lm.lm_head(hidden[:, -1:]) if self.last else hidden)

    def _session(self, session_id: int, position: int, config: Any) -> _Session:
        now = self.clock()
        for number, session in list(self.sessions.items()):
            if now - session.used_at > SESSION_IDLE_SECONDS:
                del self.sessions[number]
        if position == 0:
            self.sessions[session_id] = _Session(DynamicCache(config=config), now)
        session = self.sessions.get(session_id)
        if session is None:
            raise OutOfPlace(f"no session {session_id}")
        if position != session.length:
            raise OutOfPlace(f"session {session_id} is at {session.length}, not at {position}")
        session.used_at = now
        return session


@torch.inference_mode()
def generate_locally(model: Model, ids: list[int], count: int, *, boundaries: list[int]) -> list[int]:
    """What a chain of spans should generate greedily: the whole model in one piece, with its hidden states rounded
    to float16 before each block of ``boundaries`` and its logits rounded too."""
    lm = load_whole(model)
    cache = DynamicCache(config=lm.config)
    hooks = [
        lm.model.layers[block].register_forward_pre_hook(
            lambda _, args: (args[0].to(torch.float16).to(torch.float32), *args[1:])
        )
        for block in boundaries
    ]
    try:
        tokens: list[int] = []
        given = ids
        while len(tokens) < count:
            logits = lm(torch.tensor([given]), past_key_values=cache, use_cache=True).logits[0, -1]
            tokens.append(int(to_half(logits).argmax()))
            given = tokens[-1:]
        return tokens
    finally:
        for hook in hooks:
            hook.remove()
