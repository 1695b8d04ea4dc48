"""An answer as it is generated: pieces of text, what ended it, and how many tokens it took."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import torch

from kwaainet_bridge.hivemind.client import generate, open_session
from kwaainet_bridge.hivemind.client.text import TextStream
from kwaainet_bridge.node.generating import TextModel
from kwaainet_bridge.node.openai.bodies import ApiError, ChatRequest, CompletionRequest


class StopText:
    """Lets text through up to the first of some words; holds back what may be the beginning of one."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What of all text so far is new, and surely before any of the words."""
        self._held += text
        places = [place for word in self._words if (place := self._held.find(word)) >= 0]
        if places:
            self.found = True
            given, self._held = self._held[: min(places)], ""
            return given
        keep = max((self._overlap(word) for word in self._words), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        given, self._held = self._held, ""
        return given

    def _overlap(self, word: str) -> int:
        """Characters at the end that begin ``word``."""
        longest = min(len(word) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(word[:size])), 0)


class Answer:
    """One answer. :meth:`pieces` may be read once; the counts are right as far as it was."""

    def __init__(self, model: TextModel, asked: CompletionRequest | ChatRequest) -> None:
        """Raises ApiError for a prompt that the model cannot take."""
        self._model = model
        self._asked = asked
        self._ids = _token_ids(model, asked)
        self.prompt_tokens = len(self._ids)
        self.completion_tokens = 0
        self.finish_reason = "length"
        longest = model.weights.config.get("max_position_embeddings")
        self._most = asked.most_tokens
        if isinstance(longest, int) and self.prompt_tokens + self._most > longest:
            if self.prompt_tokens >= longest or asked.max_tokens is not None:
                raise ApiError(
                    400,
                    f"the prompt has {self.prompt_tokens} tokens and the answer may have {self._most}; "
                    f"the model takes {longest} together",
                    code="context_length_exceeded",
                )
            self._most = longest - self.prompt_tokens

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text, as it comes. Raises what sessions and generation raise. Cancelled: the servers forget it."""
        model, asked = self._model, self._asked
        text = TextStream(model.tokenizer, self._ids)
        stop = StopText(asked.stop)
        length = self.prompt_tokens + self._most
        async with open_session(model.swarm, max_length=length, ends=True) as session:
            tokens = generate(
                model.weights,
                session,
                torch.tensor([self._ids]),
                max_new_tokens=self._most,
                sampling=asked.sampling,
                eos_token_ids=model.weights.eos_token_ids,
                seed=asked.seed,
            )
            async for new in tokens:
                self.completion_tokens += 1
                if new[0] in model.weights.eos_token_ids:
                    self.finish_reason = "stop"
                    break
                if piece := stop.feed(text.feed(new)):
                    yield piece
                if stop.found:
                    self.finish_reason = "stop"
                    break
        if not stop.found and (rest := stop.feed(text.finish()) + stop.finish()):
            yield rest

    async def whole(self) -> str:
        """All of the text."""
        async with aclosing(self.pieces()) as pieces:
            return "".join([piece async for piece in pieces])

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def _token_ids(model: TextModel, asked: CompletionRequest | ChatRequest) -> list[int]:
    tokenizer, size = model.tokenizer, model.weights.vocab_size
    if isinstance(asked, ChatRequest):
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError(
                400,
                f"{model.name} has no chat template: ask /v1/completions for a continuation",
                code="no_chat_template",
                param="model",
            )
        try:
            ids = tokenizer.apply_chat_template(
                [message.turn for message in asked.messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as e:  # templates are programs of the models' makers, and refuse in their own ways
            raise ApiError(400, f"the chat template refuses these messages: {e}", param="messages") from e
    elif isinstance(asked.prompt, list) and isinstance(asked.prompt[0] if asked.prompt else 0, int):
        ids = asked.prompt
    else:
        ids = tokenizer(asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0])["input_ids"]
    if not ids:
        raise ApiError(400, "the prompt holds no token", param="prompt")
    if not all(0 <= token < size for token in ids):
        raise ApiError(400, f"token ids must lie in 0..{size - 1}", param="prompt")
    return list(ids)
