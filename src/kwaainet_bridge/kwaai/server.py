"""The `/kwaai/*` protocols of a node, mounted on its host."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property

import trio

from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import ServedSession
from kwaainet_bridge.kwaai import methods
from kwaainet_bridge.kwaai.hello import greet
from kwaainet_bridge.kwaai.inference import InferenceService, warming_up
from kwaainet_bridge.kwaai.lease import Leases, Places, Source
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.mux import MuxService
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.kwaai.tensor import TensorReceiver, TensorTaker
from kwaainet_bridge.kwaai.tensor2 import TensorExchange, TensorInbox
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc import CallContext, RpcServer
from kwaainet_bridge.wire import kwaai_mux, kwaai_tensor, kwaai_tensor2
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, InferenceResponse
from kwaainet_bridge.wire.kwaai_lease import LeaseReply, LeaseRequest
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class KwaaiProtocols:
    """Which protocols are mounted. The last three are off unless there is somewhere for what comes through them."""

    inference: bool = True
    lease: bool = True
    hello: bool = True
    mux: MuxEndpoint | None = None
    tensor: TensorTaker | None = None
    tensor2: TensorInbox | None = None


class KwaaiServer:
    """Serves a node's protocols while :func:`serve_kwaai` runs. What a protocol keeps is made at its first request."""

    def __init__(
        self,
        protocols: KwaaiProtocols,
        nursery: trio.Nursery,
        *,
        connected: Callable[[], Collection[PeerId]],
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.counts = ServingCounts()
        self._protocols = protocols
        self._nursery = nursery
        self._connected = connected
        self._clock = clock
        self._rng = rng
        self._model: ServedModel | None = None
        self._inference: InferenceService | None = None

    @property
    def open_sessions(self) -> int:
        return 0 if self._inference is None else self._inference.sessions.open_sessions

    def sessions(self) -> list[ServedSession]:
        """Those that are open."""
        return [] if self._inference is None else self._inference.sessions.sessions()

    @asynccontextmanager
    async def serving(
        self, model: ServedModel, *, counts: ServingCounts | None = None
    ) -> AsyncIterator[KwaaiServer]:
        """Serve the blocks of ``model`` for the length of the block; requests before it learn that the node warms up.

        ``counts``, if given, are added to from now on, instead of those before. At its end sessions are closed, those
        with a step that runs as soon as it has ended. ValueError if another model is served.
        """
        if self._model is not None:
            raise ValueError("a model is served already")
        self._model = model
        self.counts = self.counts if counts is None else counts
        if "_places" in self.__dict__:  # they may have been drained of another model's sessions
            self._places.accepting = True
        if "_exchange" in self.__dict__:
            self._exchange.stopping = False
        try:
            yield self
        finally:
            self._model = None
            inference, self._inference = self._inference, None
            if inference is not None:
                await inference.sessions.close()

    def pause(self) -> None:
        """Give no leases and begin nothing new; sessions that are open go on."""
        self._places.paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._places.paused = False

    async def end_sessions(self) -> None:
        """Close all sessions, those with a step that runs once it has ended, and wait for that."""
        if self._inference is not None:
            await self._inference.sessions.end_sessions()

    async def drain(self, *, timeout: float = math.inf) -> int:
        """Give no leases and begin nothing new; wait up to ``timeout`` seconds for what is under way.

        A session is under way until it has been silent for ``defaults.KWAAI_DRAIN_IDLE_SECONDS``. Returns how many
        are still open.
        """
        self._places.accepting = False
        if self._protocols.tensor2 is not None:
            self._exchange.stopping = True
        with trio.move_on_after(timeout):
            if self._inference is not None:
                await self._inference.sessions.drain()
            if "_mux" in self.__dict__:
                await self._mux.wait_idle()
            if self._protocols.tensor2 is not None:
                await self._exchange.stop()
        return self.open_sessions

    # --- what the protocols keep, made when they are first needed

    @cached_property
    def _places(self) -> Places:
        leases = Leases(lambda: self._rng.getrandbits(63))
        return Places(leases, self._sources, self._answers_to, clock=self._clock)

    @cached_property
    def _mux(self) -> MuxService:
        assert self._protocols.mux is not None
        return MuxService(self._protocols.mux, self._places)

    @cached_property
    def _tensors(self) -> TensorReceiver:
        assert self._protocols.tensor is not None
        return TensorReceiver(self._protocols.tensor)

    @cached_property
    def _exchange(self) -> TensorExchange:
        assert self._protocols.tensor2 is not None
        return TensorExchange(self._protocols.tensor2)

    def _service(self) -> InferenceService | None:
        if self._inference is None and self._model is not None:
            self._inference = InferenceService(
                self._model,
                self._places,
                self._nursery,
                self.counts,
                connected=self._connected,
                clock=self._clock,
            )
            self._inference.sessions.accepting = self._places.accepting
        return self._inference

    def _sources(self) -> list[Source]:
        sources: list[Source] = []
        if self._protocols.inference and (inference := self._service()) is not None:
            sources.append(inference.sessions)
        if self._protocols.mux is not None:
            sources.append(self._mux)
        return sources

    def _answers_to(self, name: str) -> bool:
        """Whether a caller may mean what is here by ``name``. The endpoint of the mux knows its own names."""
        if self._protocols.mux is not None:
            return True
        return self._model is None or self._model.answers_to(name)

    # --- the protocols

    async def infer(self, request: InferenceRequest, context: CallContext) -> InferenceResponse:
        service = self._service()
        return warming_up() if service is None else await service.serve(request, context)

    async def lease(self, request: LeaseRequest, context: CallContext) -> LeaseReply:
        return await self._places.lease(request, context)

    async def mux(self, stream: Stream) -> None:
        await self._mux.serve(stream)

    async def tensor(self, stream: Stream) -> None:
        await self._tensors.serve(stream)

    async def tensor2(self, stream: Stream) -> None:
        await self._exchange.serve(stream)

    async def aclose(self) -> None:
        """Close what is open to the local endpoint."""
        if "_mux" in self.__dict__:
            await self._mux.aclose()


@asynccontextmanager
async def serve_kwaai(
    host: Host,
    server: RpcServer,
    protocols: KwaaiProtocols,
    *,
    clock: Callable[[], float] = trio.current_time,
    rng: random.Random | None = None,
) -> AsyncIterator[KwaaiServer]:
    """Mount the protocols that are on for the length of the ``async with`` block.

    ``clock`` gives seconds as trio's deadlines count them; ``rng`` draws the numbers of leases. Leaving the block
    refuses new calls and streams; running ones belong to the host and end with it.
    """
    async with trio.open_nursery() as nursery:
        kwaai = KwaaiServer(
            protocols,
            nursery,
            connected=host.connected_peers,
            clock=clock,
            rng=rng or random.SystemRandom(),
        )
        mounted = []
        if protocols.inference:
            server.mount(methods.INFERENCE, kwaai.infer)
            mounted.append(methods.INFERENCE.name)
        if protocols.lease:
            server.mount(methods.LEASE, kwaai.lease)
            mounted.append(methods.LEASE.name)
        if protocols.hello:
            server.mount(methods.HELLO, greet)
            mounted.append(methods.HELLO.name)
        if protocols.mux is not None:
            host.serve(kwaai_mux.PROTOCOL, kwaai.mux)
            mounted.append(kwaai_mux.PROTOCOL)
        if protocols.tensor is not None:
            host.serve(kwaai_tensor.PROTOCOL, kwaai.tensor)
            mounted.append(kwaai_tensor.PROTOCOL)
        if protocols.tensor2 is not None:
            host.serve(kwaai_tensor2.PROTOCOL, kwaai.tensor2)
            mounted.append(kwaai_tensor2.PROTOCOL)
        try:
            yield kwaai
        finally:
            for name in mounted:
                host.unserve(name)
            await kwaai.aclose()
            nursery.cancel_scope.cancel()
