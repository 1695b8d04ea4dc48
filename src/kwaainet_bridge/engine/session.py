"""An inference session: pages of the KV cache for some blocks, and the steps that extend it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.compute import ComputeThread, Merged, Pieces
from kwaainet_bridge.engine.pages import OutOfPages, PageAllocator, PageTable, pages_for
from kwaainet_bridge.engine.prefix import Key, PrefixCache, SessionPrefix
from kwaainet_bridge.engine.requests import check_hidden, check_hypo_ids, check_prompts
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.engine.tree import Tree, plant
from kwaainet_bridge.errors import AllocationFailed, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.parallel import LeadingRunner
    from kwaainet_bridge.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """The KV cache as sessions see it: which pages there are, and to whom they are promised.

    ``page_bytes`` is what a page takes in one block. Blocks are numbered from ``first_block`` of the model.
    """

    allocator: PageAllocator
    budget: PageBudget
    page_bytes: int
    first_block: int
    prefixes: PrefixCache | None = None

    def inner(self, blocks: range) -> range:
        """Numbers from 0 on for blocks of the model."""
        return range(blocks.start - self.first_block, blocks.stop - self.first_block)


class Session:
    """What :meth:`Engine.open_session` yields; unusable after its block ends.

    One task at a time may step it.
    """

    def __init__(
        self,
        runner: Runner | LeadingRunner,
        compute: ComputeThread,
        room: CacheRoom,
        blocks: range,
        shape: tuple[int, int],
        *,
        promised: int,
        adapter: str | None,
        peer: Hashable,
        scope: Hashable = None,
    ) -> None:
        self.blocks = blocks
        self.batch_size, self.max_length = shape
        self._runner = runner
        self._compute = compute
        self._room = room
        self._inner = room.inner(blocks)
        self._promised = promised
        self._adapter = adapter
        self._peer = peer
        self._table = PageTable(room.allocator, self._inner, *shape, page_tokens=defaults.PAGE_TOKENS)
        self._prefix: SessionPrefix | None = None
        if room.prefixes is not None and scope is not None and shape[0] == 1:
            self._prefix = SessionPrefix(room.prefixes, (scope, blocks, adapter), self._table)
        self._position = 0
        self._tree: Tree | None = None
        """Of the last step, if it had one: its tokens lie behind the position until the next step."""
        self._unusable: str | None = None
        self._closed = False

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
        *,
        tree: Sequence[int] | None = None,
        accept: Sequence[int] = (),
    ) -> torch.Tensor:
        """Run [B, T, H] at positions ``position`` … ``position + T - 1`` through the blocks and remember
        them.

        ``hypo_ids`` (int64 [B]) first makes cache row i what row ``hypo_ids[i]`` was.
        ``start_from_position`` first goes back to an earlier position. ``prompts`` ([blocks, B or 1, P, H],
        P <= T) are added to the first P of these tokens before their block. T may be any number; with 0
        nothing is computed or reordered, and an empty tensor of the same shape comes back. Returns [B, T, H]
        in the engine's dtype, on the CPU.

        With ``tree`` the tokens, at most ``defaults.MAX_TREE_TOKENS``, are candidates: ``tree[i]`` is the earlier token
        of the step that token i follows, -1 for what the session has. Each is computed as if the path to it were all
        that comes; the session stays where it is. The next step says in ``accept`` which of them, a path from the
        beginning on, the session has before this step; all others are forgotten, also if it says nothing. Sessions of
        one sequence only, without prompts. A tree needs room within ``max_length`` for all its tokens.

        It may have to wait for room in the KV cache, at most ``defaults.CACHE_GROWTH_SECONDS``; then
        AllocationFailed is raised. Raises that and InvalidRequest, for what does not fit it, with the session
        unchanged. A step that is cancelled or fails may leave blocks at different positions, so the session then
        refuses further steps with InvalidRequest; closing it frees its memory as always. Where the cancellation comes
        too late to stop the last piece of work, the step counts and its result is returned.
        """
        if self._unusable is not None:
            raise InvalidRequest(self._unusable)
        check_hidden(hidden, self._runner.hidden_size, batch=self.batch_size)
        path, moves = self._check_accepted(accept, hidden)
        start = self._check_start(start_from_position, self._position + len(path))
        moves = [(source, target) for source, target in moves if target < start]
        tokens = hidden.shape[1]
        planted = None if tree is None else self._check_tree(tree, hidden, start, prompts)
        if start + tokens > self.max_length:
            raise InvalidRequest(
                f"Maximum length exceeded: prefix {start} + current {tokens} "
                f"exceeds pre-allocated maximum {self.max_length}"
            )
        prompts = check_prompts(prompts, self.blocks, hidden)
        order = check_hypo_ids(hypo_ids, self.batch_size)
        if hidden.numel() == 0:
            self._prepare(start, start=start)
            self._position, self._tree = start, None
            return hidden.detach().to(self._runner.dtype)
        step = Step(
            self.blocks, hidden.detach(), start, [], [], prompts, self._adapter, moves=moves, tree=planted
        )
        keys, found, rest = await self._begin(step, None if order is None else order.tolist())
        outputs = [output[None] for output in found]
        if rest is not None:
            outputs.append(await self._run(rest))
        output = torch.cat(outputs, 1) if found else outputs[0]
        self._position = start + (tokens if planted is None else 0)
        self._tree = planted
        if self._prefix is not None:
            self._promised -= self._prefix.keep(keys, start, output)
        return output

    async def _begin(
        self, step: Step, order: list[int] | None
    ) -> tuple[Sequence[Key], list[torch.Tensor], Step | None]:
        """Have pages for a step. Returns keys of its whole pages, outputs of those that are kept, and what is left of
        it to be computed, if anything is.

        There are no keys where the inputs would not tell what the pages hold.
        """
        tokens, keep = step.hidden.shape[1], max((source + 1 for source, _ in step.moves), default=0)
        keys: Sequence[Key] = ()
        found: list[torch.Tensor] = []
        self._unusable = "a step of this session is running"
        try:
            if self._prefix is not None:
                plain = step.prompts is None and step.tree is None and self._tree is None
                keys = await self._prefix.keys(step.hidden, step.start, plain=plain)
                found = self._prefix.adopt(keys, step.start)
            first = len(found) * defaults.PAGE_TOKENS
            start = step.start + first
            try:
                copies = await self._take_pages(start, tokens - first, order, keep=keep)
            except BaseException:
                if found:
                    self._prepare(step.start, start=step.start)
                raise
        finally:
            self._unusable = None
        if first == tokens:
            return keys, found, None
        rows = [list(row) for row in self._table.rows]
        hidden = step.hidden[:, first:]
        return keys, found, dataclasses.replace(step, hidden=hidden, start=start, rows=rows, copies=copies)

    def close(self) -> None:
        """Free the cache. No step may be running."""
        if not self._closed:
            self._closed = True
            self._table.close()
            if self._prefix is not None:
                self._prefix.settle()
            self._room.budget.give_back(self._inner, self._promised)
        self._unusable = "the session is closed"

    def _check_tree(
        self, tree: Sequence[int], hidden: torch.Tensor, start: int, prompts: torch.Tensor | None
    ) -> Tree:
        if self.batch_size != 1 or (prompts is not None and prompts.numel()):
            raise InvalidRequest("a tree goes with a session of one sequence, without prompts")
        return plant(tree, base=start, tokens=hidden.shape[1])

    def _check_accepted(
        self, accept: Sequence[int], hidden: torch.Tensor
    ) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """The accepted path of the last step's tree, and what must be moved for it."""
        if not accept:
            return (), []
        if self._tree is None:
            raise InvalidRequest("nothing can be accepted: the last step of this session had no tree")
        if hidden.shape[1] == 0:
            raise InvalidRequest("what is accepted must come with the tokens that follow it")
        path = self._tree.path(accept)
        return path, self._tree.moves(path)

    def _check_start(self, start: int | None, most: int) -> int:
        if start is None:
            return most
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= most:
            raise InvalidRequest(
                f"start_from_position must be an integer in 0..{most} (the session's position), got {start!r}"
            )
        return start

    async def _take_pages(
        self, start: int, tokens: int, order: list[int] | None, *, keep: int
    ) -> list[tuple[int, int]]:
        """Have room for ``tokens`` from ``start`` on, after going back and reordering; pages that must be copied."""
        end = start + tokens
        needed = self._table.needed(end, start=start, order=order, keep=keep)
        if self._prefix is not None:
            needed -= self._prefix.staying(start)
        if needed > self._promised:
            await self._grow(needed, end)
        try:
            return self._prepare(end, start=start, order=order, keep=keep)
        except OutOfPages:  # sessions on other blocks have left no page that is free on all of these
            raise AllocationFailed(self._refusal(needed, end)("immediately")) from None

    def _prepare(
        self, length: int, *, start: int, order: list[int] | None = None, keep: int = 0
    ) -> list[tuple[int, int]]:
        """As :meth:`PageTable.prepare`; prefixes that no session has give way."""
        prefixes = self._room.prefixes
        while True:
            try:
                copies = self._table.prepare(length, start=start, order=order, keep=keep)
                break
            except OutOfPages:
                if prefixes is None or not prefixes.evict(self._inner):
                    raise
        if self._prefix is not None:
            self._prefix.settle()
        return copies

    async def _grow(self, needed: int, length: int) -> None:
        most = self.batch_size * pages_for(self.max_length)
        ample = min(most, needed + self.batch_size * pages_for(defaults.CACHE_AHEAD_TOKENS))
        budget = self._room.budget
        if not budget.growing and budget.take_now(self._inner, ample - self._promised):
            self._promised = ample
            return
        await budget.take(
            self._inner,
            needed - self._promised,
            timeout=defaults.CACHE_GROWTH_SECONDS,
            refusal=self._refusal(needed, length),
            growing=True,
        )
        self._promised = needed

    def _refusal(self, needed: int, length: int) -> Callable[[str], str]:
        num_bytes = max(1, needed - self._promised) * len(self.blocks) * self._room.page_bytes
        owner = "The session" if self._peer is None else f"The session of {self._peer}"

        def text(when: str) -> str:
            return (
                f"Could not allocate {num_bytes} bytes {when}: out of memory. {owner} is at token {self._position} and "
                f"needs room for {length}: go on with another server, or later with a new session"
            )

        return text

    async def _run(self, step: Step) -> torch.Tensor:
        self._unusable = "a step of this session is running"
        work: Merged | Pieces
        if step.tokens <= defaults.MERGED_STEP_TOKENS:
            work = Merged(step, step.tokens, self._peer)
        else:
            work = Pieces(partial(self._runner.run_prompt, step), self._peer)
        try:
            output = await self._compute.run(work)
        except BaseException:
            self._unusable = "an earlier step of this session was cancelled or failed: open a new one"
            raise
        self._unusable = None
        return output
