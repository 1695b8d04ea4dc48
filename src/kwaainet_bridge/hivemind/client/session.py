"""An inference session over a chain of servers, which outlives the servers."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Tree, plant
from kwaainet_bridge.errors import InvalidRequest
from kwaainet_bridge.hivemind.client.attempts import RECOVERABLE, Attempts
from kwaainet_bridge.hivemind.client.history import Chunk, History
from kwaainet_bridge.hivemind.client.part import NextServer, Part, SessionShape
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.hivemind.client.snapshots import ClientSession
from kwaainet_bridge.hivemind.client.swarm import Swarm

log = logging.getLogger(__name__)


def _new_id() -> str:
    return str(uuid.uuid4())


@asynccontextmanager
async def open_session(
    swarm: Swarm,
    *,
    batch_size: int = 1,
    max_length: int,
    blocks: range | None = None,
    push: bool = False,
    ends: bool = False,
    new_id: Callable[[], str] = _new_id,
) -> AsyncIterator[InferenceSession]:
    """An inference session for the length of the ``async with`` block.

    ``max_length`` tokens of KV cache are asked of each server for each of ``batch_size`` sequences.
    ``blocks`` are those to run (None: all of the model). No server is contacted before the first step.

    ``push`` (off by default) names the rest of the chain to every server, so that it sends its output
    straight to the next one, which then starts before the client's own copy arrives. Left out wherever stock
    servers would push wrong arguments: in sessions that have used deep prompts or hypotheses.

    With ``ends`` every step comes with its token ids, and only the last token's scores are wanted. A session of one
    sequence then uses servers of other networks, too, which run the model's ends themselves.

    Leaving the block normally ends each stream in order; leaving it by an exception or cancellation resets
    them. Both free the servers' caches.
    """
    blocks = blocks or range(swarm.num_blocks)
    shape = SessionShape(blocks, batch_size, max_length, ends=ends and batch_size == 1)
    session = InferenceSession(swarm, shape, push=push, new_id=new_id)
    try:
        with swarm.using(session):
            yield session
        await session.finish()
    finally:
        await session.reset()


class InferenceSession:
    """Steps of one batch through all blocks, each continuing where the last one ended.

    When a server fails, its blocks move to other servers, which get the inputs of all earlier steps again;
    the outputs go on as if nothing had happened. For one task at a time.
    """

    def __init__(
        self, swarm: Swarm, shape: SessionShape, *, push: bool = False, new_id: Callable[[], str] = _new_id
    ) -> None:
        self.shape = shape
        self._swarm = swarm
        self._push = push
        self._new_id = new_id
        self.routes: list[tuple[int, list[str]]] = []
        """Each chain that was in use, as ``chain`` says it, with the position from which on."""
        self._position = 0
        self._began = swarm.now
        self._idle_since: float | None = self._began
        self._parts: list[Part] = []
        self._candidates: tuple[Tree, list[Chunk]] | None = None
        """Of the last step, if it had any: their tree, and what each part was given."""

    @property
    def position(self) -> int:
        """Tokens done so far."""
        return self._position

    @property
    def gives_scores(self) -> bool:
        """Whether the latest step gave scores [batch, 1, vocabulary] in the place of hidden states."""
        return bool(self._parts) and self._parts[-1].gives_scores

    @property
    def chain(self) -> list[str]:
        """The servers in use, as ``0:4 via …abcdef``; empty before the first step."""
        return [str(part.hop) for part in self._parts]

    def snapshot(self) -> ClientSession:
        """What it is and where it stands now."""
        return ClientSession(
            blocks=self.shape.blocks,
            batch_size=self.shape.batch_size,
            max_length=self.shape.max_length,
            position=self._position,
            chain=[part.hop for part in self._parts],
            adapter=self._swarm.adapter,
            began=self._began,
            idle_since=self._idle_since,
        )

    def rollback(self, position: int) -> None:
        """Go back to ``position`` tokens: the next step overwrites what came after them.

        Servers are told with that step (``start_from_position``); those too old to heed it get the history
        again on a new stream.
        """
        if not 0 <= position <= self._position:
            raise InvalidRequest(f"cannot go from position {self._position} back to {position}")
        self._position = position
        self._candidates = None
        for part in self._parts:
            part.history.truncate(position)

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the next tokens, ``hidden`` [batch, tokens, hidden size], and return their outputs, same shape
        and dtype, on the CPU. Zero tokens only make the servers allocate their caches.

        ``ids`` int64 [batch, tokens] are the tokens, in a session with ``ends``: there the output may be scores
        [batch, 1, vocabulary] of the last token, see ``gives_scores``.

        ``prompts`` [blocks, batch or 1, prefix, hidden size] with prefix <= tokens: each block adds its own
        to the first ``prefix`` of these tokens. ``hypo_ids`` int64 [batch]: before this step, sequence i
        becomes a copy of sequence ``hypo_ids[i]``. The session keeps both tensors: don't change them later.

        Raises InvalidRequest for shapes that do not fit; NoRoute when some blocks have no server, or none
        that works within ``defaults.MAX_ATTEMPTS`` attempts. After that, or cancelled, the session is where
        it was before the step, and the step may be repeated.
        """
        self._check(hidden, prompts, hypo_ids)
        self._check_ids(hidden, ids)
        if self.shape.ends and (prompts is not None or hypo_ids is not None):
            raise InvalidRequest("a session with the model's ends takes neither deep prompts nor hypo ids")
        self._candidates = None
        # not under no_grad(): that is a setting of the thread, which other tasks would leave in another order
        prompts = None if prompts is None else prompts.detach().cpu()
        chunk = Chunk(hidden.detach().cpu(), prompts, ids)
        if prompts is not None or hypo_ids is not None:
            self._push = False
        if not self._parts:
            self._parts = await self._first_parts()
            self.routes.append((self._position, self.chain))
        inputs, output = await self._run(chunk, hypo_ids)
        for part, seen in zip(self._parts, inputs, strict=True):
            if hypo_ids is not None:
                part.history.reorder(hypo_ids)
            part.history.append(seen)
        self._position += chunk.tokens
        return output

    async def tree_tokens(self) -> int:
        """How many candidates the next step may have: 0 where a server of the chain takes none, or no chain is chosen.

        Raises NetworkError or RemoteError if a server cannot be asked.
        """
        most = self.shape.max_length - self._position if self.shape.batch_size == 1 else 0
        for part in self._parts:
            most = min(most, await part.tree_tokens())
        return most if self._parts else 0

    async def step_tree(
        self, hidden: torch.Tensor, parents: Sequence[int], *, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run candidates, ``hidden`` [1, tokens, hidden size], and return their outputs, as :meth:`step`.

        ``parents[i]`` is the earlier candidate that candidate i follows, -1: what the session has. Each is computed as
        if the path to it were all that comes. The session stays where it is, until :meth:`accept` takes a path of them;
        any step before that forgets them. Raises what :meth:`step` does; TreesNotTaken if a server takes no such tree,
        then the session goes on with other steps.
        """
        self._check(hidden, None, None)
        self._check_ids(hidden, ids)
        if self.shape.batch_size != 1:
            raise InvalidRequest("a tree goes with a session of one sequence")
        tree = plant(parents, base=self._position, tokens=hidden.shape[1])
        self._candidates = None
        if not self._parts:
            raise InvalidRequest("a session begins with a step without candidates")
        chunk = Chunk(hidden.detach().cpu(), None, ids)
        inputs, output = await self._run(chunk, None, tree.parents)
        self._candidates = tree, inputs
        return output

    def accept(self, path: Sequence[int]) -> None:
        """Go on from these candidates of the last step, which follow each other from the session on.

        Servers are told with the next step. Raises InvalidRequest for what is no such path.
        """
        if self._candidates is None:
            raise InvalidRequest("nothing can be accepted: the last step of this session had no tree")
        tree, inputs = self._candidates
        path = tree.path(path)
        self._candidates = None
        for part, seen in zip(self._parts, inputs, strict=True):
            part.history.append(seen.take(path))
            part.accept(path)
        self._position += len(path)

    def _check_ids(self, hidden: torch.Tensor, ids: torch.Tensor | None) -> None:
        if self.shape.ends and (ids is None or tuple(ids.shape) != tuple(hidden.shape[:2])):
            raise InvalidRequest("a session with the model's ends needs the token ids of each step")

    def _check(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None
    ) -> None:
        shape = self.shape
        if hidden.dim() != 3 or hidden.shape[0] != shape.batch_size:
            raise InvalidRequest(
                f"hidden states {list(hidden.shape)} are not [{shape.batch_size}, tokens, hidden size]"
            )
        batch, tokens, width = hidden.shape
        if self._position + tokens > shape.max_length:
            raise InvalidRequest(
                f"Maximum length exceeded: prefix {self._position} + current {tokens} exceeds pre-allocated "
                f"maximum {shape.max_length}"
            )
        if prompts is not None and not (
            prompts.dim() == 4
            and prompts.shape[0] == len(shape.blocks)
            and prompts.shape[1] in (1, batch)
            and 0 < prompts.shape[2] <= tokens
            and prompts.shape[3] == width
        ):
            raise InvalidRequest(
                f"deep prompts {list(prompts.shape)} are not [{len(shape.blocks)}, 1 or {batch}, "
                f"1 to {tokens}, {width}]"
            )
        if hypo_ids is not None and (hypo_ids.dtype != torch.int64 or hypo_ids.shape != (batch,)):
            raise InvalidRequest(f"hypo ids must be int64 [{batch}]")
        if hypo_ids is not None and not bool(((hypo_ids >= 0) & (hypo_ids < batch)).all()):
            raise InvalidRequest(f"hypo ids must be sequences of the batch, 0 to {batch - 1}")

    async def _first_parts(self) -> list[Part]:
        chain = await self._chain(self.shape.blocks)
        log.info("%s: route %s", self._swarm.prefix, " => ".join(map(str, chain)))
        return [self._part(hop, History()) for hop in chain]

    async def _chain(self, blocks: range, instead: range | None = None) -> list[Hop]:
        shape = self.shape
        tokens = shape.batch_size * shape.max_length
        return await self._swarm.session_chain(blocks, tokens, ends=shape.ends, instead=instead)

    async def _run(
        self, chunk: Chunk, hypo_ids: torch.Tensor | None, tree: Sequence[int] | None = None
    ) -> tuple[list[Chunk], torch.Tensor]:
        """Pass ``chunk`` along the chain; returns the input of every part, and the output of the last.

        Replaces parts that fail. Leaves the histories to the caller.
        """
        self._idle_since = None
        step_id = self._new_id()
        begun_anew = 0
        inputs: list[Chunk] = []
        feed = chunk
        try:
            while len(inputs) < len(self._parts):
                inputs.append(feed)
                may_begin_anew = begun_anew < defaults.MAX_ATTEMPTS
                step = partial(self._step_part, feed=feed, hypo_ids=hypo_ids, step_id=step_id, tree=tree)
                output = await self._run_part(len(inputs) - 1, step, may_begin_anew=may_begin_anew)
                if output is None:
                    begun_anew += 1
                    inputs, feed = [], chunk
                else:
                    feed = Chunk(output, chunk.prompts)
        except BaseException:
            # Whoever was at work is in an unknown state. Those before are ahead, which the next step mends,
            # unless they also reordered their caches.
            first = len(inputs) - 1 if hypo_ids is None else 0
            for part in self._parts[first : len(inputs)]:
                await part.reset()
            raise
        finally:
            self._idle_since = self._swarm.now
        return inputs, feed.hidden

    async def _step_part(
        self,
        index: int,
        *,
        feed: Chunk,
        hypo_ids: torch.Tensor | None,
        step_id: str,
        tree: Sequence[int] | None,
    ) -> torch.Tensor:
        following = self._next_servers(index)
        return await self._parts[index].step(
            feed, hypo_ids=hypo_ids, step_id=step_id, next_servers=following, tree=tree
        )

    async def _run_part(
        self, index: int, step: Callable[[int], Awaitable[torch.Tensor]], *, may_begin_anew: bool
    ) -> torch.Tensor | None:
        """The output of one part, or of what takes its place; None when another chain took the place of all parts."""
        attempts = Attempts(self._swarm, self._parts[index].hop.blocks)
        while True:
            part = self._parts[index]
            try:
                output = await step(index)
            except RECOVERABLE as e:
                await part.reset()
                await attempts.failed(part.hop, e)
            else:
                self._swarm.note_success(part.hop)
                return output
            if await self._replace(index, attempts, may_begin_anew=may_begin_anew):
                return None

    def _next_servers(self, index: int) -> list[NextServer]:
        """Those after ``index`` that are ready for this step, up to the first that is not."""
        if not self._push:
            return []
        following = (part.next_server for part in self._parts[index + 1 :])
        return list(itertools.takewhile(lambda server: server is not None, following))  # type: ignore[arg-type]

    async def _replace(self, index: int, attempts: Attempts, *, may_begin_anew: bool) -> bool:
        """Put other servers, which have caught up, in the place of one part; or, True, of all parts.

        The latter where the remaining servers cannot run that part's blocks alone: those of other networks run all of
        their blocks or none.
        """
        old = self._parts[index]
        instead = self.shape.blocks if self.shape.ends and may_begin_anew and len(self._parts) > 1 else None
        while True:
            try:
                chain = await self._chain(old.hop.blocks, instead)
            except RECOVERABLE as e:
                await attempts.failed(None, e)
                continue
            log.info("%s: new route %s", self._swarm.prefix, " => ".join(map(str, chain)))
            is_whole = range(chain[0].blocks.start, chain[-1].blocks.stop) != old.hop.blocks
            history = self._parts[0].history if is_whole else old.history
            if parts := await self._rebuild(chain, history, attempts):
                replaced = slice(None) if is_whole else slice(index, index + 1)
                for part in self._parts[replaced]:
                    await part.reset()
                self._parts[replaced] = parts
                self.routes.append((self._position, self.chain))
                return is_whole

    async def _rebuild(self, chain: Sequence[Hop], history: History, attempts: Attempts) -> list[Part] | None:
        """Sessions along ``chain`` whose caches hold ``history``; None if one of the servers failed."""
        parts: list[Part] = []
        for hop in chain:
            parts.append(self._part(hop, history))
            try:
                history = History(await parts[-1].catch_up())
            except BaseException as e:
                for part in parts:
                    await part.reset()
                if not isinstance(e, RECOVERABLE):
                    raise
                await attempts.failed(hop, e)
                return None
        return parts

    def _part(self, hop: Hop, history: History) -> Part:
        return self._swarm.part(hop, self.shape, history, new_id=self._new_id)

    async def finish(self) -> None:
        """End the session with all servers in order, each within ``defaults.CLOSE_GRACE_SECONDS``."""
        async with trio.open_nursery() as nursery:
            for part in self._parts:
                nursery.start_soon(part.finish)

    async def reset(self) -> None:
        """Drop all streams. Never raises, may be repeated."""
        for part in self._parts:
            await part.reset()
