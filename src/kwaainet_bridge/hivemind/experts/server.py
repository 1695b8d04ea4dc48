"""The expert server: what Petals calls a server, mounted on a host."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.inference import InferenceService
from kwaainet_bridge.hivemind.experts.push import Pusher
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.stateless import StatelessService
from kwaainet_bridge.rpc import RpcClient, RpcServer


class ExpertServer:
    """Serves one span of blocks to Petals clients while :func:`serve_span` runs."""

    def __init__(
        self,
        span: ServedSpan,
        rpc: RpcServer,
        stateless: StatelessService,
        inference: InferenceService,
        counts: ServingCounts,
    ) -> None:
        self.span = span
        self.counts = counts
        self._rpc = rpc
        self._stateless = stateless
        self._inference = inference

    @property
    def open_sessions(self) -> int:
        return self._inference.open_sessions

    async def drain(self, *, timeout: float = math.inf) -> int:
        """Take no new sessions; wait up to ``timeout`` seconds for the running ones and for all requests.

        Forward and backward are served on meanwhile: their clients learn from the records that this server
        leaves. Returns how many sessions are still open.
        """
        self._inference.accepting = False
        with trio.move_on_after(timeout):
            await self._inference.wait_idle()
            await self._stateless.wait_idle()
            with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS):
                await self._rpc.wait_streams_over()  # stock clients deadlock if cut off in their farewell
        return self.open_sessions


@asynccontextmanager
async def serve_span(
    span: ServedSpan,
    server: RpcServer,
    client: RpcClient,
    *,
    counts: ServingCounts | None = None,
    clock: Callable[[], float] = trio.current_time,
) -> AsyncIterator[ExpertServer]:
    """Mount the seven expert calls for the length of the ``async with`` block.

    Leaving the block refuses new calls and cuts off the sessions that are open, each once its running step has ended;
    other running calls belong to the host and end with it. Outgoing pushes are cancelled. ``counts``, if given, are
    added to.
    """
    async with trio.open_nursery() as nursery:
        counts = counts or ServingCounts()
        stateless = StatelessService(span, counts)
        inference = InferenceService(span, Pusher(client, nursery), counts, clock=clock)
        server.mount(methods.RPC_INFO, stateless.info)
        server.mount(methods.RPC_FORWARD, stateless.forward)
        server.mount(methods.RPC_BACKWARD, stateless.backward)
        server.mount(methods.RPC_PUSH, inference.push)
        for method, handler, part in (
            (methods.RPC_FORWARD_STREAM, stateless.forward_stream, defaults.MAX_PART_BYTES),
            (methods.RPC_BACKWARD_STREAM, stateless.backward_stream, defaults.MAX_PART_BYTES),
            (methods.RPC_INFERENCE, inference.inference, span.max_request_bytes + defaults.MAX_PART_BYTES),
        ):
            server.mount_stream(method, handler, max_message_bytes=part)
        try:
            yield ExpertServer(span, server, stateless, inference, counts)
        finally:
            for mounted in methods.ALL:
                server.unmount(mounted)
            with trio.CancelScope(shield=True):
                await inference.cut_off()
            nursery.cancel_scope.cancel()
