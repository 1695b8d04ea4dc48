"""Guesses at what comes next, which a swarm then checks in one step: speculative decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from kwaainet_bridge.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may come next: ``parents[i]`` is the earlier candidate that candidate i follows, -1: what there is.

    One guess of several tokens is ``parents`` -1, 0, 1, …; two guesses at the next token are -1, -1.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise InvalidRequest for what is no tree."""
        if len(self.tokens) != len(self.parents) or any(
            not -1 <= parent < index for index, parent in enumerate(self.parents)
        ):
            raise InvalidRequest(
                f"candidates: each of {len(self.tokens)} tokens needs a parent, -1 or an earlier one, "
                f"got {list(self.parents)[:20]}"
            )

    @classmethod
    def line(cls, tokens: list[int]) -> Candidates:
        """One guess."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    def first(self, count: int) -> Candidates:
        """At most the first ``count``; a token never comes before the one it follows."""
        return Candidates(self.tokens[:count], self.parents[:count])


Draft: TypeAlias = Callable[[torch.Tensor], Candidates]
"""Candidates for what follows token ids int64 [1, tokens]. Called in a worker thread; none at all is an answer."""


@dataclass(frozen=True, slots=True)
class LookupDraft:
    """Guesses that what followed the last ``words`` tokens when they came before follows again. Needs no model."""

    words: int = 2
    length: int = 8

    def __call__(self, ids: torch.Tensor) -> Candidates:
        tokens = ids[0].tolist()
        last = tokens[-self.words :]
        for start in range(len(tokens) - self.words - 1, -1, -1):
            if tokens[start : start + self.words] == last:
                follows = start + self.words
                return Candidates.line(tokens[follows : follows + self.length])
        return Candidates()
