"""An inference session: a KV cache for some blocks, and the steps that extend it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.compute import ComputeThread, Priority
from kwaainet_bridge.engine.passes import add_prompt
from kwaainet_bridge.engine.requests import check_hidden, check_hypo_ids, check_prompts
from kwaainet_bridge.errors import InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.attention import SpanCache
    from kwaainet_bridge.engine.span import Span


class Session:
    """What :meth:`Engine.open_session` yields; unusable after its block ends.

    One task at a time may step it.
    """

    def __init__(
        self, span: Span, compute: ComputeThread, blocks: range, cache: SpanCache, shape: tuple[int, int]
    ) -> None:
        self.blocks = blocks
        self.batch_size, self.max_length = shape
        self._span = span
        self._compute = compute
        self._cache: SpanCache | None = cache
        self._position = 0
        self._unusable: str | None = None

    @property
    def position(self) -> int:
        """How many tokens of each sequence the cache holds: where the next step begins."""
        return self._position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        start_from_position: int | None = None,
    ) -> torch.Tensor:
        """Run [B, T, H] at positions ``position`` … ``position + T - 1`` through the blocks and remember
        them.

        ``hypo_ids`` (int64 [B]) first makes cache row i what row ``hypo_ids[i]`` was.
        ``start_from_position`` first goes back to an earlier position. ``prompts`` ([blocks, B or 1, P, H],
        P <= T) are added to the first P of these tokens before their block. T may be any number; with 0
        nothing is computed or reordered, and an empty tensor of the same shape comes back. Returns [B, T, H]
        in the engine's dtype, on the CPU.

        Raises InvalidRequest, with the session unchanged, for what does not fit it. A step that is cancelled
        or fails may leave blocks at different positions, so the session then refuses further steps with
        InvalidRequest; closing it frees its memory as always. Where the cancellation comes too late to stop
        the last piece of work, the step counts and its result is returned.
        """
        if self._unusable is not None:
            raise InvalidRequest(self._unusable)
        check_hidden(hidden, self._span.model.config.hidden_size, batch=self.batch_size)
        start = self._check_start(start_from_position)
        tokens = hidden.shape[1]
        if start + tokens > self.max_length:
            raise InvalidRequest(
                f"Maximum length exceeded: prefix {start} + current {tokens} "
                f"exceeds pre-allocated maximum {self.max_length}"
            )
        prompts = check_prompts(prompts, self.blocks, hidden)
        rows = check_hypo_ids(hypo_ids, self.batch_size)
        if hidden.numel() == 0:
            self._position = start
            return hidden.detach().to(self._span.dtype)
        output = await self._run(hidden, prompts, rows, start)
        self._position = start + tokens
        return output

    def close(self) -> None:
        """Drop the cache. No step may be running."""
        self._cache = None
        self._unusable = "the session is closed"

    def _check_start(self, start: int | None) -> int:
        if start is None:
            return self._position
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= self._position:
            raise InvalidRequest(
                f"start_from_position must be an integer in 0..{self._position} "
                f"(the session's position), got {start!r}"
            )
        return start

    async def _run(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, rows: torch.Tensor | None, start: int
    ) -> torch.Tensor:
        self._unusable = "a step of this session is running"
        try:
            if self.batch_size * hidden.shape[1] <= defaults.MERGED_STEP_TOKENS:
                work = partial(self._whole_step, hidden, prompts, rows, start)
                output = await self._compute.run(work, Priority.INFERENCE)
            else:
                output = await self._long_step(hidden, prompts, rows, start)
        except BaseException:
            self._unusable = "an earlier step of this session was cancelled or failed: open a new one"
            raise
        self._unusable = None
        return output

    async def _long_step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, rows: torch.Tensor | None, start: int
    ) -> torch.Tensor:
        """Block by block and in chunks of tokens, so that other sessions' steps come between."""
        chunk = max(1, defaults.PIECE_TOKENS // self.batch_size)
        state = await self._compute.run(partial(self._begin, hidden, rows), Priority.INFERENCE)
        for index, block in enumerate(self.blocks):
            prompt = None if prompts is None else prompts[index]
            output = torch.empty_like(state)
            for offset in range(0, state.shape[1], chunk):
                where = slice(offset, offset + chunk)
                work = partial(self._chunk, block, state, output, where, prompt=prompt, start=start)
                await self._compute.run(work, Priority.INFERENCE)
            state = output
        return await self._compute.run(partial(state.to, "cpu"), Priority.INFERENCE)

    def _begin(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        if rows is not None:
            self._live_cache.reorder(rows.to(self._span.device), self._position)
        return hidden.to(self._span.device, self._span.dtype)

    def _chunk(
        self,
        block: int,
        state: torch.Tensor,
        output: torch.Tensor,
        where: slice,
        *,
        prompt: torch.Tensor | None,
        start: int,
    ) -> None:
        part = add_prompt(state[:, where], prompt, where.start)
        output[:, where] = self._span.run(block, part, start=start + where.start, cache=self._live_cache)

    def _whole_step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, rows: torch.Tensor | None, start: int
    ) -> torch.Tensor:
        state = self._begin(hidden, rows)
        for index, block in enumerate(self.blocks):
            state = add_prompt(state, None if prompts is None else prompts[index])
            state = self._span.run(block, state, start=start, cache=self._live_cache)
        return state.to("cpu")

    @property
    def _live_cache(self) -> SpanCache:
        if self._cache is None:
            raise InvalidRequest("the session is closed")
        return self._cache
