"""One of our averagers that does one thing wrong, at a chosen message of a chosen call."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch
import trio
from averaging_mix import OurPeer
from averaging_pool import Swarm

from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.averaging import AveragingData
from kwaainet_bridge.wire.tensors import TensorMessage, decode_tensor, encode_tensor

SAYS, HEARS, ANSWERS = "what a caller sends", "what a caller receives", "what a server sends"
BAD = 3
"""The number of the peer that misbehaves."""


class Wire:
    """One call of the peer that misbehaves, as an action sees it."""

    def __init__(self, saboteur: Saboteur, stream: Any) -> None:
        self.saboteur = saboteur
        self.stream = stream
        self.open_another: Callable[[], Any]  # a call of the same kind to the same peer

    async def send(self, message: Any) -> None:
        await self.stream.send(message)

    def give_back(self, message: Any) -> None:
        """What an action received, for the averager to receive."""
        raise NotImplementedError

    async def end(self) -> None:
        """Send nothing more; the other side is told that it is the end."""
        raise NotImplementedError

    async def fail(self) -> None:
        """Send a frame that holds an error."""
        raise NotImplementedError


Action = Callable[[Wire, Any], Awaitable[None]]
Change = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Fault:
    """``act`` instead of message number ``at`` of each call, or only the first, whose name ends with ``call``."""

    call: str
    where: str
    at: int
    act: Action
    once: bool = False


class _Over(Exception):
    """The handler of a call returns."""


class _Caller(Wire):
    def __init__(self, saboteur: Saboteur, stream: Any) -> None:
        super().__init__(saboteur, stream)
        self._sent = self._received = 0
        self._over = False
        self._returned: list[Any] = []

    def give_back(self, message: Any) -> None:
        self._returned.append(message)

    async def end(self) -> None:
        self._over = True
        await self.stream.end()

    async def fail(self) -> None:
        self._over = True
        await self.stream._stream.write(frames.encode_error("no disk"))


class _FaultyClientStream:
    def __init__(self, wire: _Caller) -> None:
        self.peer = wire.stream.peer
        self._wire = wire

    async def send(self, message: Any, **options: Any) -> None:
        wire = self._wire
        number, wire._sent = wire._sent, wire._sent + 1
        if wire._over:
            return
        if wire.saboteur.strikes(SAYS, number):
            await wire.saboteur.fault.act(wire, message)
        else:
            wire.saboteur.count_unanswered(1)
            await wire.stream.send(message, **options)

    async def end(self, **options: Any) -> None:
        if not self._wire._over:
            await self._wire.stream.end(**options)

    async def receive(self, **options: Any) -> Any:
        wire = self._wire
        if wire._returned:
            return wire._returned.pop()
        message = await wire.stream.receive(**options)
        wire.saboteur.count_unanswered(-1)
        number, wire._received = wire._received, wire._received + 1
        if wire.saboteur.strikes(HEARS, number):
            await wire.saboteur.fault.act(wire, message)
        return message

    def __aiter__(self) -> _FaultyClientStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class _Server(Wire):
    async def end(self) -> None:
        raise _Over

    async def fail(self) -> None:
        raise RuntimeError("no disk")


class _FaultyServerStream:
    def __init__(self, wire: _Server) -> None:
        self.context = wire.stream.context
        self._wire = wire
        self._sent = 0

    async def send(self, message: Any) -> None:
        number, self._sent = self._sent, self._sent + 1
        if self._wire.saboteur.strikes(ANSWERS, number):
            await self._wire.saboteur.fault.act(self._wire, message)
        else:
            await self._wire.stream.send(message)

    async def receive(self, **options: Any) -> Any:
        return await self._wire.stream.receive(**options)


class Saboteur:
    """Puts a fault between an averager and its calls. ``fired`` counts how often it struck."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.fired = 0
        self.struck = trio.Event()
        self.killed = trio.Event()
        self._unanswered = 0
        self._counted = trio.Event()
        self._peer: Peer | None = None

    def strikes(self, where: str, number: int) -> bool:
        if where != self.fault.where or number != self.fault.at or (self.fault.once and self.fired):
            return False
        self.fired += 1
        self.struck.set()
        self.struck = trio.Event()
        return True

    async def wait_struck(self, times: int = 1) -> None:
        while self.fired < times:
            await self.struck.wait()

    def count_unanswered(self, messages: int) -> None:
        """Messages that its calls sent and that nobody answered yet, more or fewer by so many."""
        self._unanswered += messages
        self._counted.set()
        self._counted = trio.Event()

    async def wait_answered(self) -> None:
        while self._unanswered:
            await self._counted.wait()

    def wrap(self, peer: Peer) -> Peer:
        self._peer = peer
        client: Any = _FaultyClient(peer.client, self)
        server: Any = _FaultyServer(peer.server, self)
        return dataclasses.replace(peer, client=client, server=server)

    async def die(self) -> None:
        """Break all connections as the system does for a process that is killed, and do nothing more."""
        assert self._peer is not None
        host: Any = self._peer.host
        for connection in host.connections:
            connection.stop("killed")
        self.killed.set()
        await trio.sleep_forever()

    async def join(self, swarm: Swarm, **options: Any) -> OurPeer:
        """The averager that misbehaves, as number ``BAD`` of a swarm; it lives until it is killed."""

        async def live(task_status: trio.TaskStatus[OurPeer]) -> None:
            async with trio.open_nursery() as living:
                task_status.started(await swarm.our_peer(BAD, living, wrapped=self.wrap, **options))
                await self.killed.wait()
                living.cancel_scope.cancel()

        peer: OurPeer = await swarm.nursery.start(live)
        return peer


class _FaultyClient:
    def __init__(self, client: Any, saboteur: Saboteur) -> None:
        self._client = client
        self._saboteur = saboteur

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @asynccontextmanager
    async def stream(self, peer: Any, method: Any, **options: Any) -> AsyncIterator[Any]:
        async with self._client.stream(peer, method, **options) as stream:
            if not method.name.endswith(self._saboteur.fault.call):
                yield stream
                return
            wire = _Caller(self._saboteur, stream)
            wire.open_another = lambda: self._client.stream(peer, method, **options)
            yield _FaultyClientStream(wire)


class _FaultyServer:
    def __init__(self, server: Any, saboteur: Saboteur) -> None:
        self._server = server
        self._saboteur = saboteur

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def mount_stream(self, method: Any, handler: Any, **options: Any) -> None:
        async def serve(stream: Any) -> None:
            with suppress(_Over):
                await handler(_FaultyServerStream(_Server(self._saboteur, stream)))

        faulty = method.name.endswith(self._saboteur.fault.call)
        self._server.mount_stream(method, serve if faulty else handler, **options)


# --- actions ----------------------------------------------------------------------------------------------


async def stay_silent(wire: Wire, message: Any) -> None:
    await trio.sleep_forever()


async def end(wire: Wire, message: Any) -> None:
    await wire.end()


async def fail(wire: Wire, message: Any) -> None:
    await wire.fail()


async def die(wire: Wire, message: Any) -> None:
    await wire.saboteur.die()


async def die_answered(wire: Wire, message: Any) -> None:
    """With no part of it waiting at another member for those of the others."""
    await wire.saboteur.wait_answered()
    await wire.saboteur.die()


def die_after(seconds: float) -> Action:
    async def act(wire: Wire, message: Any) -> None:
        await trio.sleep(seconds)
        await wire.saboteur.die()

    return act


async def twice(wire: Wire, message: Any) -> None:
    await wire.send(message)
    await wire.send(message)


def late(seconds: float) -> Action:
    async def act(wire: Wire, message: Any) -> None:
        await trio.sleep(seconds)
        await wire.send(message)

    return act


def say(change: Change) -> Action:
    """Another message in place of this one."""

    async def act(wire: Wire, message: Any) -> None:
        await wire.send(change(message))

    return act


# --- changes of messages ----------------------------------------------------------------------------------


def with_fields(**fields: Any) -> Change:
    """Of a protobuf message, or one of ours."""

    def change(message: Any) -> Any:
        if dataclasses.is_dataclass(message):
            return dataclasses.replace(message, **fields)  # type: ignore[type-var]
        changed = type(message)()
        changed.CopyFrom(message)
        for name, value in fields.items():
            if isinstance(value, list | tuple):
                changed.ClearField(name)
                getattr(changed, name).extend(value)
            else:
                setattr(changed, name, value)
        return changed

    return change


def with_values(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Other values in the tensor of a message."""

    def changed(message: AveragingData) -> AveragingData:
        assert message.tensor_part is not None
        part = change(decode_tensor(message.tensor_part, name="part").detach().clone())
        return dataclasses.replace(message, tensor_part=encode_tensor(part))

    return changed


def with_tensor(**fields: Any) -> Change:
    """Other fields in the tensor of a message: they need not fit each other."""

    def change(message: AveragingData) -> AveragingData:
        assert message.tensor_part is not None
        part = message.tensor_part
        plain: dict[str, Any] = {"values": [part.buffer], "size": part.size, "dtype": part.dtype}
        return dataclasses.replace(message, tensor_part=TensorMessage(**plain | fields))

    return change


def spoilt(values: torch.Tensor) -> torch.Tensor:
    values[1] = torch.nan
    return values
