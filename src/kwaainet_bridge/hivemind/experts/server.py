"""The expert server: what Petals calls a server, mounted on a host for any number of models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import ServedSession
from kwaainet_bridge.errors import Refusal
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.inference import InferenceService, next_request
from kwaainet_bridge.hivemind.experts.push import Pusher
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.stateless import StatelessService
from kwaainet_bridge.rpc import CallContext, RpcClient, RpcServer, ServerStream
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo, ExpertUID

_Call = ServerStream[ExpertRequest, ExpertResponse]


class ExpertServer:
    """Serves one span of blocks to Petals clients while :meth:`ExpertCalls.serving` runs."""

    def __init__(
        self,
        span: ServedSpan,
        stateless: StatelessService,
        inference: InferenceService,
        counts: ServingCounts,
    ) -> None:
        self.span = span
        self.counts = counts
        self.stateless = stateless
        self.inference = inference
        self._streams = 0
        self._quiet = trio.Event()

    @property
    def open_sessions(self) -> int:
        return self.inference.open_sessions

    def sessions(self) -> list[ServedSession]:
        """Those that are open, and those that wait for room in the KV cache."""
        return self.inference.sessions()

    @property
    def cache_tokens_left(self) -> int:
        """Room of the KV cache in tokens of one block."""
        engine = self.span.engine
        tokens: int = engine.cache_bytes_left // engine.cache_bytes_per_token
        return tokens

    def follow(self, call: _Call) -> None:
        """Note that a streaming call is about this span, until it is over."""
        self._streams += 1
        call.at_end(self._stream_over)

    def _stream_over(self) -> None:
        self._streams -= 1
        if not self._streams:
            self._quiet.set()
            self._quiet = trio.Event()

    def pause(self) -> None:
        """Take no new sessions and no forward and backward requests; those that run go on."""
        self.inference.paused = self.stateless.paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self.inference.paused = self.stateless.paused = False

    async def end_sessions(self) -> None:
        """End those that are open, each once its running step has ended, and wait for that."""
        await self.inference.end_sessions("this server is paused by its operator: go on with another one")

    async def drain(self, *, timeout: float = math.inf) -> int:
        """Take no new sessions; wait up to ``timeout`` seconds for the running ones and for all requests.

        Forward and backward are served on meanwhile: their clients learn from the records that this server
        leaves. Returns how many sessions are still open.
        """
        self.inference.accepting = False
        with trio.move_on_after(timeout):
            await self.inference.wait_idle()
            await self.stateless.wait_idle()
            with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS):
                while self._streams:  # stock clients deadlock if cut off in their farewell
                    await self._quiet.wait()
        return self.open_sessions


class ExpertCalls:
    """The seven calls of a Petals server on one host, for all models whose blocks are served there.

    A request is the model's whose prefix its first block has. One that is about none of them is answered as by the
    model that has been here longest, which knows that it does not serve such a block.
    """

    def __init__(
        self, server: RpcServer, client: RpcClient, *, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._rpc = server
        self._client = client
        self._clock = clock
        self._servers: dict[str, ExpertServer] = {}
        self._inference_bytes = 0

    @asynccontextmanager
    async def serving(
        self, span: ServedSpan, *, counts: ServingCounts | None = None
    ) -> AsyncIterator[ExpertServer]:
        """Serve ``span`` for the length of the ``async with`` block; the calls are mounted while any span is served.

        Leaving the block refuses new calls and cuts off the span's sessions that are open, each once its running step
        has ended; other running calls belong to the host and end with it. Outgoing pushes are cancelled. What concerns
        other spans goes on. ``counts``, if given, are added to. ValueError if the prefix is served already.
        """
        if span.prefix in self._servers:
            raise ValueError(f"blocks of {span.prefix} are served already")
        async with trio.open_nursery() as nursery:
            counts = counts or ServingCounts()
            inference = InferenceService(span, Pusher(self._client, nursery), counts, clock=self._clock)
            server = ExpertServer(span, StatelessService(span, counts), inference, counts)
            self._servers[span.prefix] = server
            self._mount()
            try:
                yield server
            finally:
                del self._servers[span.prefix]
                self._mount()
                with trio.CancelScope(shield=True):
                    await inference.cut_off()
                nursery.cancel_scope.cancel()

    def _mount(self) -> None:
        """Mount what is not, or not for messages as large as the present spans take; unmount it without any."""
        sizes = [server.span.max_request_bytes + defaults.MAX_PART_BYTES for server in self._servers.values()]
        largest, mounted = max(sizes, default=0), self._inference_bytes
        self._inference_bytes = largest
        if largest == mounted:
            return
        if mounted:
            for method in methods.ALL if not largest else (methods.RPC_INFERENCE,):
                self._rpc.unmount(method)
        if largest and not mounted:
            self._rpc.mount(methods.RPC_INFO, self._info)
            self._rpc.mount(methods.RPC_FORWARD, self._forward)
            self._rpc.mount(methods.RPC_BACKWARD, self._backward)
            self._rpc.mount(methods.RPC_PUSH, self._push)
            part = defaults.MAX_PART_BYTES
            self._rpc.mount_stream(methods.RPC_FORWARD_STREAM, self._forward_stream, max_message_bytes=part)
            self._rpc.mount_stream(methods.RPC_BACKWARD_STREAM, self._backward_stream, max_message_bytes=part)
        if largest:
            self._rpc.mount_stream(methods.RPC_INFERENCE, self._inference, max_message_bytes=largest)

    def _of(self, uid: str) -> ExpertServer:
        """Whose request it is that names these blocks. Raises Refusal once nothing is served any more."""
        if not self._servers:
            raise Refusal("this server is shutting down and takes no new sessions")
        prefix = uid.partition(" ")[0].rpartition(".")[0]
        return self._servers.get(prefix) or next(iter(self._servers.values()))

    async def _info(self, request: ExpertUID, context: CallContext) -> ExpertInfo:
        if not request.uid and self._servers:  # about no model: the tightest has room for what is told
            tightest = min(self._servers.values(), key=lambda server: server.cache_tokens_left)
            return await tightest.stateless.info(request, context)
        return await self._of(request.uid).stateless.info(request, context)

    async def _forward(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        return await self._of(request.uid).stateless.forward(request, context)

    async def _backward(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        return await self._of(request.uid).stateless.backward(request, context)

    async def _push(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        return await self._of(request.uid).inference.push(request, context)

    async def _forward_stream(self, call: _Call) -> None:
        first = await _first_part(call)
        server = self._of(first.uid)
        server.follow(call)
        await server.stateless.forward_stream(call, first)

    async def _backward_stream(self, call: _Call) -> None:
        first = await _first_part(call)
        server = self._of(first.uid)
        server.follow(call)
        await server.stateless.backward_stream(call, first)

    async def _inference(self, call: _Call) -> None:
        first = await next_request(call)
        if first is None:
            return
        server = self._of(first.uid)
        server.follow(call)
        serving = server.inference.inference(call, first)
        del first  # it may be large, and the session last for half an hour
        await serving


async def _first_part(call: _Call) -> ExpertRequest:
    # whoever opens a stream and stays silent takes nobody's place
    with trio.move_on_after(defaults.FIRST_REQUEST_SECONDS), contextlib.suppress(trio.EndOfChannel):
        return await call.receive(hold=True)
    raise Refusal("no request came", kind="ValueError")


@asynccontextmanager
async def serve_span(
    span: ServedSpan,
    server: RpcServer,
    client: RpcClient,
    *,
    counts: ServingCounts | None = None,
    clock: Callable[[], float] = trio.current_time,
) -> AsyncIterator[ExpertServer]:
    """Serve the blocks of one model, alone on the host of ``server``: see :meth:`ExpertCalls.serving`."""
    async with ExpertCalls(server, client, clock=clock).serving(span, counts=counts) as expert:
        yield expert
