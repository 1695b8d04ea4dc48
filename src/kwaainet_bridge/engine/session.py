"""An inference session: pages of the KV cache for some blocks, and the steps that extend it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.aside import aside
from kwaainet_bridge.engine.compute import ComputeThread, Merged, Pieces
from kwaainet_bridge.engine.holding import CacheRoom, Holding
from kwaainet_bridge.engine.requests import check_hidden, check_hypo_ids, check_prompts
from kwaainet_bridge.engine.snapshots import SessionSnapshot
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.engine.tree import Tree, plant
from kwaainet_bridge.errors import InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.parallel import LeadingRunner
    from kwaainet_bridge.engine.runner import Runner


RUNNING = "a step of this session is running"
BROKEN = "an earlier step of this session was cancelled or failed: open a new one"


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
        self._adapter = adapter
        self._peer = peer
        if scope is not None:
            scope = scope, blocks, adapter
        self._holding = Holding(room, blocks, shape, promised=promised, peer=peer, scope=scope)
        self._tree: Tree | None = None
        """Of the last step, if it had one: its tokens lie behind the position until the next step."""
        self._unusable: str | None = None
        self._computing = False

    @property
    def position(self) -> int:
        """How many tokens of each sequence the cache holds: where the next step begins."""
        return self._holding.position

    def snapshot(self) -> SessionSnapshot:
        """What it is and holds now."""
        holding = self._holding
        return SessionSnapshot(
            blocks=self.blocks,
            batch_size=self.batch_size,
            max_length=self.max_length,
            position=holding.position,
            cache_tokens=holding.held_tokens,
            promised_tokens=holding.promised_tokens,
            moved_out=holding.moved_out,
            adapter=self._adapter,
        )

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
        start = self._check_start(start_from_position, self._holding.position + len(path))
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
        step = Step(
            self.blocks, hidden.detach(), start, [], [], prompts, self._adapter, moves=moves, tree=planted
        )
        self._unusable, self._holding.idle_since = RUNNING, None
        try:
            output = await self._step(step, None if order is None else order.tolist())
        except BaseException:
            self._unusable = BROKEN if self._computing else None
            raise
        finally:
            self._holding.rest()
        self._unusable = None
        self._holding.position = start + (tokens if planted is None else 0)
        self._tree = planted
        return output

    async def _step(self, step: Step, order: list[int] | None) -> torch.Tensor:
        holding = self._holding
        await holding.come_back(self._alone)
        if step.hidden.numel() == 0:
            holding.go_back(step.start)
            return step.hidden.to(self._runner.dtype)
        plain = step.prompts is None and step.tree is None and self._tree is None
        begun = await holding.begin(step, order, plain=plain)
        outputs = [output[None] for output in begun.found]
        if begun.rest is not None:
            outputs.append(await self._alone(self._work(begun.rest)))
        output = outputs[0]
        if begun.found:
            output = await aside(sum(part.nbytes for part in outputs), lambda: torch.cat(outputs, 1))
        await holding.keep(begun.keys, step.start, output)
        return output

    def _work(self, step: Step) -> Merged | Pieces:
        if step.tokens <= defaults.MERGED_STEP_TOKENS:
            return Merged(step, step.tokens, self._peer)
        return Pieces(partial(self._runner.run_prompt, step), self._peer)

    async def _alone(self, work: Merged | Pieces) -> Any:
        """Run work after which the session cannot go on if it does not end well."""
        self._computing = True
        result = await self._compute.run(work)
        self._computing = False
        return result

    def close(self) -> None:
        """Free the cache. No step may be running."""
        self._holding.close()
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
