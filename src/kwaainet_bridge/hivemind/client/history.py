"""The inputs that one span of blocks has seen in a session, kept to rebuild its KV cache elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a session as a span of blocks receives them.

    ``hidden`` is [batch, tokens, hidden]. ``prompts`` are the deep prompts of *all* the session's blocks,
    [blocks, batch or 1, prefix, hidden] with prefix <= tokens: each block adds its own to the first
    ``prefix`` of these tokens.
    """

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.hidden.shape[1])

    def head(self, tokens: int) -> Chunk:
        """The first ``tokens`` tokens."""
        prompts = None if self.prompts is None else self.prompts[:, :, :tokens]
        return Chunk(self.hidden[:, :tokens], prompts)

    def rows(self, indices: torch.Tensor) -> Chunk:
        """The sequences ``indices`` (int64 [batch]) of the batch."""
        prompts = self.prompts
        if prompts is not None and prompts.shape[1] > 1:
            prompts = prompts[:, indices]
        return Chunk(self.hidden[indices], prompts)


class History:
    """Inputs in the order of their positions. The tensors are kept by reference and never changed."""

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.tokens]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self._chunks)

    def append(self, chunk: Chunk) -> None:
        if chunk.tokens:
            self._chunks.append(chunk)

    def truncate(self, tokens: int) -> None:
        """Forget everything from position ``tokens`` on."""
        kept: list[Chunk] = []
        for chunk in self._chunks:
            if tokens <= 0:
                break
            kept.append(chunk if chunk.tokens <= tokens else chunk.head(tokens))
            tokens -= chunk.tokens
        self._chunks = kept

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """Let sequence i continue what was sequence ``hypo_ids[i]``, as the servers do with their caches."""
        self._chunks = [chunk.rows(hypo_ids) for chunk in self._chunks]

    def pieces(self, max_tokens: int) -> Iterator[Chunk]:
        """The whole history in steps of at most ``max_tokens`` tokens, or of one prefix if that is longer.

        Prompts apply to the beginning of a step, so a chunk that has them begins a piece.
        """
        run: list[torch.Tensor] = []
        prompts: torch.Tensor | None = None
        room = 0
        for chunk in self._chunks:
            rest = chunk.hidden
            if chunk.prompts is not None:
                if run:
                    yield Chunk(torch.cat(run, dim=1), prompts)
                run, prompts = [], chunk.prompts
                room = max(max_tokens, prompts.shape[2])
            while rest.shape[1]:
                if room == 0:
                    if run:
                        yield Chunk(torch.cat(run, dim=1), prompts)
                    run, prompts, room = [], None, max_tokens
                part, rest = rest[:, :room], rest[:, room:]
                run.append(part)
                room -= part.shape[1]
        if run:
            yield Chunk(torch.cat(run, dim=1), prompts)
