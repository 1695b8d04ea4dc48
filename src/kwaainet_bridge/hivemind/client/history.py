"""The inputs that one span of blocks has seen in a session, kept to rebuild its KV cache elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a session as a span of blocks receives them.

    ``hidden`` is [batch, tokens, hidden]. ``prompts`` are the deep prompts of *all* the session's blocks,
    [blocks, batch or 1, prefix, hidden] with prefix <= tokens: each block adds its own to the first
    ``prefix`` of these tokens. ``ids`` int64 [batch, tokens] are the tokens themselves, where they are known: as the
    input of the model's first block.
    """

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.hidden.shape[1])

    def head(self, tokens: int) -> Chunk:
        """The first ``tokens`` tokens."""
        prompts = None if self.prompts is None else self.prompts[:, :, :tokens]
        return Chunk(self.hidden[:, :tokens], prompts, None if self.ids is None else self.ids[:, :tokens])

    def tail(self, tokens: int) -> Chunk:
        """All but the first ``tokens`` tokens, without prompts."""
        return Chunk(self.hidden[:, tokens:], None, None if self.ids is None else self.ids[:, tokens:])

    def take(self, tokens: Sequence[int]) -> Chunk:
        """The tokens with these numbers, without prompts."""
        chosen = list(tokens)
        return Chunk(self.hidden[:, chosen], None, None if self.ids is None else self.ids[:, chosen])

    def rows(self, indices: torch.Tensor) -> Chunk:
        """The sequences ``indices`` (int64 [batch]) of the batch."""
        prompts = self.prompts
        if prompts is not None and prompts.shape[1] > 1:
            prompts = prompts[:, indices]
        return Chunk(self.hidden[indices], prompts, None if self.ids is None else self.ids[indices])


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
        run: list[Chunk] = []
        prompts: torch.Tensor | None = None
        room = 0
        for chunk in self._chunks:
            rest = Chunk(chunk.hidden, None, chunk.ids)
            if chunk.prompts is not None:
                if run:
                    yield _joined(run, prompts)
                run, prompts = [], chunk.prompts
                room = max(max_tokens, prompts.shape[2])
            while rest.tokens:
                if room == 0:
                    if run:
                        yield _joined(run, prompts)
                    run, prompts, room = [], None, max_tokens
                part, rest = rest.head(room), rest.tail(room)
                run.append(part)
                room -= part.tokens
        if run:
            yield _joined(run, prompts)


def _joined(run: list[Chunk], prompts: torch.Tensor | None) -> Chunk:
    ids = [chunk.ids for chunk in run if chunk.ids is not None]
    hidden = torch.cat([chunk.hidden for chunk in run], dim=1)
    return Chunk(hidden, prompts, torch.cat(ids, dim=1) if len(ids) == len(run) else None)
