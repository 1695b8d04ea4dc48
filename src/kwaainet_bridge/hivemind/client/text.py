"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_CONTEXT_TOKENS = 8
"""Tokens that decide about a leading space, and for which half a character is held back at most."""


class Decoder(Protocol):
    """A tokenizer, as transformers has them."""

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


class TextStream:
    """Turns a stream of token ids into pieces of text that, put together, are the text of all of them.

    A token may be part of a character, and whether it begins with a space may depend on the one before. So a
    piece is what the text of a few tokens gains by the new ones, held back while it ends in half a character.
    ``prompt`` gives the tokens before the first one; their text is not returned. Special tokens have none.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT_TOKENS:])  # text given out already
        self._pending: list[int] = []

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that ``tokens`` complete, possibly none."""
        return "".join(self._feed_one(token) for token in tokens)

    def _feed_one(self, token: int) -> str:
        self._pending.append(token)
        piece = self._gain()
        # half a character decodes to the replacement character
        if piece.endswith(_REPLACEMENT) and len(self._pending) < _CONTEXT_TOKENS:
            return ""
        return self._give(piece)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        return self._give(self._gain())

    def _gain(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _give(self, piece: str) -> str:
        self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        # the clean-up would change text that was given out already
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
