"""Text out of a session: embed, run the chain, apply the head, choose a token, repeat."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import InvalidRequest, TreesNotTaken
from kwaainet_bridge.hivemind.client.drafts import Candidates, Draft

log = logging.getLogger(__name__)


class ClientWeights(Protocol):
    """The layers that a client runs itself. Called in worker threads, one call at a time."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden size] of token ids int64 [batch, tokens]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [..., vocabulary] of the last block's outputs [..., hidden size]."""
        ...


class Steps(Protocol):
    """What generation needs of an inference session."""

    @property
    def position(self) -> int: ...

    @property
    def gives_scores(self) -> bool:
        """Whether the latest step gave scores of the last token in the place of hidden states."""
        ...

    async def step(self, hidden: torch.Tensor, *, ids: torch.Tensor) -> torch.Tensor: ...

    async def tree_tokens(self) -> int: ...

    async def step_tree(
        self, hidden: torch.Tensor, parents: Sequence[int], *, ids: torch.Tensor
    ) -> torch.Tensor: ...

    def accept(self, path: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the names and meanings are those of transformers' GenerationConfig.

    With ``do_sample`` off the likeliest token wins, and only ``repetition_penalty`` has an effect.
    ``top_k`` 0 and ``top_p`` 1 do not restrict.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InvalidRequest(f"temperature {self.temperature} must be above 0; do_sample=False is greedy")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k {self.top_k} must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p {self.top_p} must be above 0, at most 1 (no limit)")
        if self.repetition_penalty <= 0:
            raise InvalidRequest(f"repetition_penalty {self.repetition_penalty} must be above 0")

    def processors(self) -> Any:
        """transformers' processors in transformers' order, as one callable of (ids, scores)."""
        from transformers import generation

        chosen = generation.LogitsProcessorList()
        if self.repetition_penalty != 1:
            chosen.append(generation.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample:
            if self.temperature != 1:
                chosen.append(generation.TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chosen.append(generation.TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                chosen.append(generation.TopPLogitsWarper(self.top_p))
        return chosen


GREEDY = Sampling()


def generate(
    weights: ClientWeights,
    session: Steps,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_token_ids: Collection[int] = (),
    seed: int | None = None,
    draft: Draft | None = None,
) -> AsyncIterator[list[int]]:
    """Continue ``input_ids`` (int64 [batch, tokens]): iterate over one token per sequence and step.

    ``input_ids`` are all tokens from the start of the session. Those that the session has done already are
    not sent again, so that a conversation goes on with the same session and the longer ids. The session's
    ``max_length`` must have room for all of them and the new tokens but the last.

    Ends after ``max_new_tokens`` or when every sequence has had one of ``eos_token_ids``; that token is the
    last one given for its sequence, and is repeated while others go on. The prompts of a batch have the same
    length: the protocol knows no padding. ``seed`` makes sampling repeatable; None draws a new one.

    ``draft`` guesses, for a session of one sequence, what comes next; one step checks its guesses, and tokens of which
    it guessed right come without a step of their own. They are the same tokens as without it. Where a server of
    the chain takes no such steps, which stock servers and KwaaiNet's do not, tokens come one by one.

    Raises InvalidRequest for ids without a new token; iterating raises what ``session.step`` does. Torch work
    runs in a worker thread. Cancelled, or not read to the end: the session stays usable.
    """
    done = session.position
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.shape[1] <= done:
        raise InvalidRequest(
            f"token ids {list(input_ids.shape)} {input_ids.dtype}: expected int64 [batch, tokens] with more "
            f"than the {done} tokens that the session has done"
        )
    if draft is not None and input_ids.shape[0] != 1:
        raise InvalidRequest(f"a draft guesses for one sequence, not for {input_ids.shape[0]}")
    chooser = _Chooser(weights, sampling, eos_token_ids, seed)
    return _Generation(chooser, session, input_ids, max_new_tokens, draft)


class _Generation(AsyncIterator[list[int]]):
    """An object rather than an async generator: it may be left at any token without being closed."""

    def __init__(
        self, chooser: _Chooser, session: Steps, input_ids: torch.Tensor, left: int, draft: Draft | None
    ) -> None:
        self._draft = draft
        self._checked: deque[int] = deque()  # tokens that a draft guessed right, and the one after them
        self._chooser = chooser
        self._session = session
        self._ids = input_ids
        self._left = left
        # [batch, hidden size or vocabulary] of the last token that the session has done
        self._output = torch.empty(0)
        self._thread = trio.CapacityLimiter(1)

    async def __anext__(self) -> list[int]:
        if self._checked:
            return [self._checked.popleft()]
        chooser, ids = self._chooser, self._ids
        if self._left <= 0 or chooser.finished:
            raise StopAsyncIteration
        if self._draft is not None and self._session.position == ids.shape[1] - 1:
            await self._check_guesses(self._draft)
            if self._checked:
                return [self._checked.popleft()]
        # after a cancelled call some or all of the tokens are done
        new = ids[:, self._session.position :]
        # a long prompt in several steps, so that no server gets more than it takes at a time
        for part in new.split(max(1, defaults.PREFILL_TOKENS // ids.shape[0]), dim=1):
            if part.shape[1]:
                hidden = await trio.to_thread.run_sync(chooser.embed, part, limiter=self._thread)
                self._output = (await self._session.step(hidden, ids=part))[:, -1]
        tokens = await trio.to_thread.run_sync(
            chooser.choose, ids, self._output, self._session.gives_scores, limiter=self._thread
        )
        self._ids = torch.cat([ids, tokens[:, None]], dim=1)
        self._left -= 1
        return [int(token) for token in tokens]

    async def _check_guesses(self, draft: Draft) -> None:
        """Run the last token and the draft's candidates for what follows it in one step; keep what is right."""
        session, ids = self._session, self._ids
        most = await session.tree_tokens()
        if most == 0:
            log.info("the draft is not used: a server of the chain takes no tree steps")
            self._draft = None
            return
        guess = await trio.to_thread.run_sync(self._guess, draft, ids, most - 1, limiter=self._thread)
        if not guess.tokens:
            return
        parents = (-1, *(parent + 1 for parent in guess.parents))
        part = torch.tensor([[int(ids[0, -1]), *guess.tokens]])
        hidden = await trio.to_thread.run_sync(self._chooser.embed, part, limiter=self._thread)
        try:
            outputs = await session.step_tree(hidden, parents, ids=part)
        except TreesNotTaken as e:  # of a server that has come into the chain meanwhile
            log.info("the draft is not used any more: %s", e)
            self._draft = None
            return
        path, tokens = await trio.to_thread.run_sync(
            self._chooser.follow, ids, outputs, part, parents, self._left, limiter=self._thread
        )
        session.accept(path)
        self._ids = torch.cat([ids, torch.tensor([tokens])], dim=1)
        self._left -= len(tokens)
        self._checked.extend(tokens)

    def _guess(self, draft: Draft, ids: torch.Tensor, most: int) -> Candidates:
        return draft(ids).first(min(most, defaults.MAX_TREE_TOKENS - 1))


class _Chooser:
    """The torch side of generation. One call at a time, from any thread."""

    def __init__(
        self, weights: ClientWeights, sampling: Sampling, eos_token_ids: Collection[int], seed: int | None
    ) -> None:
        self._weights = weights
        self._sampling = sampling
        self._process = sampling.processors()
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64)
        self._rng = torch.Generator()
        if seed is None:
            self._rng.seed()
        else:
            self._rng.manual_seed(seed)
        self._ended: torch.Tensor | None = None  # bool [batch]: sequences that have had their last token

    @property
    def finished(self) -> bool:
        return self._ended is not None and bool(self._ended.all())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._weights.embed(ids)

    def choose(self, ids: torch.Tensor, output: torch.Tensor, is_scores: bool) -> torch.Tensor:
        """The next token of each sequence, int64 [batch], from hidden states or scores [batch, their size]."""
        with torch.no_grad():
            scores = self._process(ids, (output if is_scores else self._weights.logits(output)).float())
            if self._sampling.do_sample:
                chances = torch.softmax(scores, dim=-1)
                tokens = torch.multinomial(chances, 1, generator=self._rng)[:, 0]
            else:
                tokens = scores.argmax(dim=-1)
            if self._ended is not None:
                tokens = torch.where(self._ended, ids[:, -1], tokens)
            self._ended = torch.isin(tokens, self._eos)
        return tokens

    def follow(
        self,
        ids: torch.Tensor,
        outputs: torch.Tensor,
        candidates: torch.Tensor,
        parents: Sequence[int],
        most: int,
    ) -> tuple[list[int], list[int]]:
        """The candidates that are what would be chosen anyway, from the first on, and what is chosen after each.

        ``outputs`` [1, candidates, hidden size]; ``most`` tokens are chosen at most.
        """
        path, tokens = [0], []
        while True:
            token = self.choose(ids, outputs[:, path[-1]], is_scores=False)
            tokens.append(int(token))
            ids = torch.cat([ids, token[:, None]], dim=1)
            if self.finished or len(tokens) == most:
                return path, tokens
            following = [
                node
                for node, parent in enumerate(parents)
                if parent == path[-1] and int(candidates[0, node]) == tokens[-1]
            ]
            if not following:
                return path, tokens
            path.append(following[0])
