"""One server's part of an inference session: its blocks, what they have seen, and the stream to it."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError, StreamClosed, StreamReset, TreesNotTaken
from kwaainet_bridge.hivemind.client import calls
from kwaainet_bridge.hivemind.client.history import Chunk, History
from kwaainet_bridge.hivemind.client.part import NextServer, SessionShape
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.hivemind.experts import trees
from kwaainet_bridge.hivemind.experts.methods import RPC_INFERENCE
from kwaainet_bridge.rpc import ClientStream
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse

if TYPE_CHECKING:
    from kwaainet_bridge.hivemind.client.swarm import Swarm

log = logging.getLogger(__name__)


class SpanSession:
    """A stream of ``rpc_inference`` to one server, opened when first needed and again after ``reset``.

    ``history`` holds the inputs of these blocks up to the session's position; the session appends to it when
    a step is complete over the whole chain, so the server may be ahead of it, never behind.
    """

    def __init__(
        self,
        swarm: Swarm,
        hop: Hop,
        shape: SessionShape,
        history: History,
        *,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.hop = hop
        self.history = history
        self.session_id = ""
        self.steps = 0  # answered on the present stream
        self.position = 0  # tokens in the server's cache
        self._swarm = swarm
        self._shape = shape
        self._new_id = new_id
        self._accepted: tuple[int, ...] = ()
        """What the server is still to be told of the candidates of the last step."""
        self._stream: ClientStream[ExpertRequest, ExpertResponse] | None = None
        self._exit = contextlib.AsyncExitStack()

    @property
    def gives_scores(self) -> bool:
        return False

    @property
    def next_server(self) -> NextServer | None:
        """How a server before this one addresses pushes to it, if its cache holds the history, no more and no less."""
        if self.steps == 0 or self.position != self.history.tokens:
            return None
        return str(self.hop.peer), self.session_id, self.hop.blocks.start, self.hop.blocks.stop

    async def catch_up(self) -> list[Chunk]:
        """Make the server's cache hold the history; returns the outputs of whatever had to be replayed.

        Raises NetworkError or RemoteError.
        """
        tokens = self.history.tokens
        traits = await self._swarm.traits(self.hop)
        if self._stream is not None and self.position > tokens and not traits.rolls_back:
            await self.reset()
        outputs: list[Chunk] = []
        if self._stream is None:
            await self._open()
            limit = max(1, defaults.PREFILL_TOKENS // max(1, self._shape.batch_size))
            for piece in self.history.pieces(limit):
                hidden = await self._exchange(piece, None, self._new_id(), self.position, ())
                outputs.append(Chunk(hidden, piece.prompts))
        return outputs

    async def step(
        self,
        chunk: Chunk,
        *,
        hypo_ids: torch.Tensor | None,
        step_id: str,
        next_servers: Sequence[NextServer] = (),
        tree: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run ``chunk`` through the server's blocks after catching up; returns hidden states of its shape.

        Raises NetworkError or RemoteError, TreesNotTaken. After that, and when cancelled, the stream must be reset.
        """
        if tree is not None and len(tree) > (most := await self.tree_tokens()):
            raise TreesNotTaken(
                f"{self.hop} takes trees of {most} tokens, not of {len(tree)}: take steps of single tokens"
            )
        await self.catch_up()
        return await self._exchange(chunk, hypo_ids, step_id, self.history.tokens, next_servers, tree=tree)

    async def tree_tokens(self) -> int:
        """How many tokens a tree may have here, 0: none is taken. Raises NetworkError or RemoteError."""
        return (await self._swarm.traits(self.hop)).tree_tokens

    def accept(self, path: Sequence[int]) -> None:
        """Of the candidates of the last step these are the session's: the server is told with the next step."""
        self._accepted = tuple(path)
        self.position += len(path)

    async def _open(self) -> None:
        stream = self._swarm.rpc.stream(self.hop.peer, RPC_INFERENCE, open_timeout=defaults.CONNECT_SECONDS)
        self._stream = await self._exit.enter_async_context(stream)
        self.session_id = self._new_id()
        self.steps = self.position = 0
        self._accepted = ()

    async def _exchange(
        self,
        chunk: Chunk,
        hypo_ids: torch.Tensor | None,
        step_id: str,
        start: int,
        next_servers: Sequence[NextServer],
        *,
        tree: Sequence[int] | None = None,
    ) -> torch.Tensor:
        stream = self._stream
        if stream is None:
            raise StreamClosed(f"the session with {self.hop} is not open")
        traits = await self._swarm.traits(self.hop)
        offset = self.hop.blocks.start - self._shape.blocks.start
        prompts = calls.NO_TENSOR
        if chunk.prompts is not None:
            prompts = chunk.prompts[offset : offset + len(self.hop.blocks)]
        arguments = (chunk.hidden, prompts, calls.NO_INDICES if hypo_ids is None else hypo_ids)
        request = ExpertRequest(
            uid=self._swarm.uid(self.hop.blocks),
            tensors=await calls.encode_arguments(arguments, traits.inference),
            metadata=msgpack.pack(
                self._metadata(step_id, start, next_servers) | trees.to_metadata(self._tree_fields(tree))
            ),
        )
        # a server that refused says why before it closes: read on although sending failed
        with contextlib.suppress(StreamReset):
            await stream.send(request, timeout=defaults.CLIENT_STEP_SECONDS)
        try:
            answer = await stream.receive(timeout=defaults.CLIENT_STEP_SECONDS)
        except trio.EndOfChannel as e:
            raise StreamClosed(f"{self.hop.peer} ended the session without an answer") from e
        (hidden,) = await calls.decode_answer(answer.tensors, [chunk.hidden.shape], chunk.hidden.dtype)
        self.steps += 1
        self.position = start + (chunk.tokens if tree is None else 0)
        self._accepted = ()
        return hidden

    def _tree_fields(self, tree: Sequence[int] | None) -> trees.TreeFields:
        return trees.TreeFields(None if tree is None else tuple(tree), self._accepted)

    def _metadata(self, step_id: str, start: int, next_servers: Sequence[NextServer]) -> dict[str, Any]:
        metadata: dict[str, Any] = {"session_id": self.session_id, "step_id": step_id}
        structure = calls.args_structure(3)
        if self.steps == 0:
            # stock's order of keys, in the first request and in later ones
            metadata["max_length"] = self._shape.max_length
            metadata["points"] = 0.0
            metadata["active_adapter"] = self._swarm.adapter
            metadata["args_structure"] = structure
            metadata["start_from_position"] = start
            return metadata
        if next_servers:
            metadata["next_servers"] = tuple(next_servers)
        metadata["start_from_position"] = start
        metadata["args_structure"] = structure
        return metadata

    async def finish(self) -> None:
        """End the session in order: an empty request, end-of-stream, then wait for the server to close.

        Never raises but Cancelled: nothing is lost if the server is gone.
        """
        if self._stream is not None and self.steps:
            with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS):
                try:
                    await self._stream.send(ExpertRequest())
                    await self._stream.end()
                    async for _ in self._stream:
                        log.debug("%s answered after the end of the session", self.hop.peer)
                except (NetworkError, RemoteError) as e:
                    log.debug("session with %s did not end in order: %s", self.hop.peer, e)
        self._stream = None
        await self._exit.aclose()

    async def reset(self) -> None:
        """Drop the stream, so that the server frees its cache at once. Never raises, may be repeated."""
        self._stream = None
        self.steps = self.position = 0
        self._accepted = ()
        dropped = _Dropped()
        await self._exit.__aexit__(_Dropped, dropped, None)


class _Dropped(Exception):
    """Leaves the stream's context by an exception, which resets the stream rather than closing it."""
