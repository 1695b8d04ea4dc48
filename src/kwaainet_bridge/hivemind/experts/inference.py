"""rpc_inference and rpc_push: sessions over the KV cache.

Source: Petals main ``server/handler.py`` and ``server/block_functions.py``; recorded messages of sessions.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import ServedSession, Session
from kwaainet_bridge.errors import AllocationFailed, BridgeError, InvalidRequest, Refusal
from kwaainet_bridge.hivemind.experts import trees
from kwaainet_bridge.hivemind.experts.push import Pusher, PushLimit
from kwaainet_bridge.hivemind.experts.requests import (
    Metadata,
    count_bytes,
    decode_tensors,
    encode_tensors,
    optional,
)
from kwaainet_bridge.hivemind.experts.span import ServedSpan, as_refusal
from kwaainet_bridge.rpc import CallContext, ServerStream
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LiveSession:
    """One client's open inference session on this server."""

    peer: PeerId
    session_id: str | None
    blocks: range
    batch_size: int
    adapter: str | None
    call: ServerStream[ExpertRequest, ExpertResponse]
    request: ExpertRequest | None
    """The step that is served now. Its tensors hold all the bytes that it came with, so nobody else keeps it."""

    began: float
    session: Session | None = None
    idle_since: float | None = None
    ended_for: str | None = None
    """Why this server ends it, once it does."""
    steps_done: OrderedDict[str, None] = field(default_factory=OrderedDict)
    limit: trio.CancelScope = field(default_factory=trio.CancelScope)

    def remember(self, step_id: str | None) -> None:
        if step_id is not None:
            self.steps_done[step_id] = None
            while len(self.steps_done) > defaults.REMEMBERED_STEPS:
                self.steps_done.popitem(last=False)

    def snapshot(self) -> ServedSession:
        """What it is and holds now."""
        return ServedSession(
            peer=self.peer,
            name=self.session_id,
            blocks=self.blocks,
            adapter=self.adapter,
            began=self.began,
            idle_since=self.idle_since,
            session=None if self.session is None else self.session.snapshot(),
        )

    def accepts_push(self, request: ExpertRequest, blocks: range, hidden_size: int) -> bool:
        """Whether a pushed step has this session's blocks and shape. Its numbers are the client's risk."""
        shape = list(request.tensors[0].size) if request.tensors else []
        fits = len(shape) == 3 and shape[0] == self.batch_size and shape[2] == hidden_size
        return fits and blocks == self.blocks


class InferenceService:
    """Runs inference sessions, one per streaming call, and feeds them the steps that other servers push."""

    def __init__(
        self, span: ServedSpan, pusher: Pusher, counts: ServingCounts, *, clock: Callable[[], float]
    ) -> None:
        self._span = span
        self._counts = counts
        self._pusher = pusher
        self._by_id: dict[str, list[LiveSession]] = defaultdict(list)
        self._by_peer: dict[PeerId, int] = defaultdict(int)
        self._push_limit = PushLimit(clock)
        self._clock = clock
        self._changed = trio.Event()
        self._open: set[LiveSession] = set()
        self.accepting = True
        """Whether new sessions are taken; running ones go on either way."""
        self.paused = False
        """Whether none are for now."""

    @property
    def open_sessions(self) -> int:
        return sum(self._by_peer.values())

    def sessions(self) -> list[ServedSession]:
        """Those that are open, and those that wait for room."""
        return [live.snapshot() for live in self._open]

    async def cut_off(self) -> None:
        """Take no new sessions and end those that are open, each once its running step has ended."""
        self.accepting = False
        await self.end_sessions("this server serves these blocks no longer")

    async def end_sessions(self, why: str) -> None:
        """End those that are open, each once its running step has ended; their clients are told ``why``."""
        for live in self._open:
            live.ended_for = why
            live.limit.cancel()
        await self.wait_idle()

    async def wait_idle(self) -> None:
        """Return once no session is open."""
        while self.open_sessions:
            await self._changed.wait()

    async def inference(
        self, call: ServerStream[ExpertRequest, ExpertResponse], first: ExpertRequest
    ) -> None:
        """Serve one session, of which ``first`` came, until its client ends it, leaves, or is silent for too long.

        It keeps ``first`` no longer than it takes to compute it, and neither should the caller.
        """
        with self._refusals_counted():
            if not self.accepting:
                raise Refusal("this server is shutting down and takes no new sessions")
            if self.paused:
                raise Refusal("this server is paused by its operator and takes no new sessions")
            serving = self._serve(call, first)
            del first  # the session may outlive it by half an hour
            await serving

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except Refusal:
            self._counts.refused += 1
            raise

    async def _serve(self, call: ServerStream[ExpertRequest, ExpertResponse], first: ExpertRequest) -> None:
        blocks = self._span.chain(first.uid)
        metadata = Metadata(first.metadata)
        max_length = metadata.max_length
        engine = self._span.engine
        if not 0 <= max_length <= engine.max_length:
            raise Refusal(f"Cannot allocate KV cache for {max_length} tokens, max = {engine.max_length}")
        metadata.check_common()
        adapter = metadata.adapter(engine.adapters)
        batch_size = _batch_size(first)
        peer = call.context.peer
        live = LiveSession(
            peer, metadata.session_id, blocks, batch_size, adapter, call, first, began=self._clock()
        )
        alloc_timeout = metadata.alloc_timeout
        del first, metadata  # as above
        try:
            with self._registered(live), live.limit:
                live.limit.deadline = trio.current_time() + defaults.SESSION_TIMEOUT_SECONDS
                async with engine.open_session(
                    blocks,
                    batch_size,
                    max_length,
                    timeout=alloc_timeout,
                    adapter=live.adapter,
                    peer=live.peer,
                ) as live.session:
                    await self._run(live, live.session)
        except (InvalidRequest, AllocationFailed) as e:
            raise as_refusal(e) from e
        if live.limit.cancelled_caught:
            if live.ended_for is not None:
                raise Refusal(live.ended_for)
            raise Refusal(
                f"the session lasted longer than {defaults.SESSION_TIMEOUT_SECONDS:g} s", kind="TimeoutError"
            )

    @contextmanager
    def _registered(self, live: LiveSession) -> Iterator[None]:
        if self._by_peer[live.peer] >= defaults.MAX_SESSIONS_PER_PEER:
            raise Refusal(f"one peer may hold {defaults.MAX_SESSIONS_PER_PEER} sessions open, and you do")
        same_id = self._by_id[live.session_id] if live.session_id is not None else []
        if any(other.peer == live.peer for other in same_id):
            raise Refusal(f"session id {live.session_id} is not unique", kind="AssertionError")
        same_id.append(live)
        self._open.add(live)
        self._by_peer[live.peer] += 1
        try:
            yield
        finally:
            same_id.remove(live)
            self._open.discard(live)
            self._by_peer[live.peer] -= 1
            if live.session_id is not None and not same_id:
                self._by_id.pop(live.session_id, None)
            if not self._by_peer[live.peer]:
                del self._by_peer[live.peer]
            self._changed.set()
            self._changed = trio.Event()

    async def _run(self, live: LiveSession, session: Session) -> None:
        while live.request is not None and live.request.tensors:
            await self._step(live, session, live.request)
            live.request = None  # not while the session waits for the next
            live.idle_since = self._clock()
            live.request = await next_request(live.call)
            live.idle_since = None

    async def _step(self, live: LiveSession, session: Session, request: ExpertRequest) -> None:
        metadata = Metadata(request.metadata)
        step_id = metadata.step_id
        if step_id is not None and step_id in live.steps_done:
            return  # the other copy of a step that came both by push and from the client
        times = [self._clock()]
        try:
            metadata.check_common()
            adapter = metadata.adapter(self._span.engine.adapters)
            if adapter not in (None, live.adapter):
                raise Refusal("a session keeps the adapter that it was opened with", kind="ValueError")
            tensors = await decode_tensors(request.tensors)
            hidden, prompts, hypo_ids, *_ = [*metadata.arrange(tensors), None, None, None]
            if hidden is None:
                raise Refusal("the first argument must be the hidden states", kind="ValueError")
            fields = trees.from_metadata(metadata.raw)
            times.append(self._clock())
            output = await session.step(
                hidden,
                prompts=optional(prompts),
                hypo_ids=optional(hypo_ids),
                start_from_position=metadata.start_from_position,
                tree=fields.parents,
                accept=fields.accept,
            )
        except BridgeError as e:
            if not metadata.pushed:
                raise
            log.debug("session %.40r: a pushed step is left out: %.200s", live.session_id, e)
            return  # the client's own copy of the step decides
        times.append(self._clock())
        live.remember(step_id)
        counts = self._counts
        counts.steps += 1
        counts.step_tokens += output.shape[0] * output.shape[1]
        response = ExpertResponse(tensors=await encode_tensors([output], [self._span.compression]))
        if optional(prompts) is None:
            self._pusher.push(self._span.prefix, request, metadata, response.tensors[0])
        count_bytes(counts.received_bytes, request.tensors)
        count_bytes(counts.sent_bytes, response.tensors)
        await live.call.send(response)
        counts.time_step(*times, self._clock())

    async def push(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        """Feed a pushed step to the live session that it names; ignore one that fits none, as stock does."""
        blocks = self._span.chain(request.uid)
        metadata = Metadata(request.metadata)
        session_id = metadata.session_id
        if session_id is None:
            raise Refusal("session_id", kind="KeyError")
        # whatever the sender says: what comes this way is never the client's own word
        request.metadata = msgpack.pack({**metadata.raw, "pushed": True})
        hidden_size = self._span.engine.model.hidden_size
        # without a step id it could not be told from the client's own copy
        candidates = self._by_id.get(session_id, ()) if metadata.step_id is not None else ()
        for live in candidates:
            if live.accepts_push(request, blocks, hidden_size) and live.call.offer(request.copied()):
                return ExpertResponse()
        self._push_limit.count_unknown(context.peer)
        return ExpertResponse()


def _batch_size(request: ExpertRequest) -> int:
    if not request.tensors:
        return 1
    size = request.tensors[0].size
    if len(size) != 3:
        shown = list(size)[:8]
        raise Refusal(f"hidden states must be [batch, tokens, hidden size], got {shown}", kind="ValueError")
    return int(size[0])


async def next_request(call: ServerStream[ExpertRequest, ExpertResponse]) -> ExpertRequest | None:
    """The next step; None when the client ended its requests or was silent for the step timeout."""
    request = None
    with trio.move_on_after(defaults.STEP_TIMEOUT_SECONDS) as waiting, contextlib.suppress(trio.EndOfChannel):
        request = await call.receive()
    if waiting.cancelled_caught:
        log.info("session of %s ended: no step for %g s", call.context.peer, defaults.STEP_TIMEOUT_SECONDS)
    return request
