"""Streams in memory, with the semantics of the real ones; for tests and for calls within one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import trio

from kwaainet_bridge.errors import (
    NetworkError,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    StreamReset,
)
from kwaainet_bridge.net.host import Host, StreamHandler
from kwaainet_bridge.net.pruning import Protection
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


class _Pipe:
    """One direction: a bounded buffer with the three ways it can end."""

    def __init__(self, window: int) -> None:
        self.buffer = bytearray()
        self.window = window
        self.finished = False
        self.reset = False
        self.abandoned = False  # the reader left: writes are swallowed, as they are after a remote close
        self.changed = trio.Event()
        self.watcher: Callable[[], object] | None = None  # the reader's

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()
        if self.watcher is not None and (self.buffer or self.finished or self.reset):
            notify, self.watcher = self.watcher, None
            notify()


class MemoryStream(Stream):
    """One end of :func:`memory_stream_pair`."""

    def __init__(self, remote: PeerId, protocol: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.remote = remote
        self.protocol = protocol
        self._in = incoming
        self._out = outgoing
        self._closed = False

    async def read(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise StreamClosed("read after close")
            if self._in.buffer:
                data = bytes(self._in.buffer[:max_bytes])
                del self._in.buffer[:max_bytes]
                self._in.notify()
                return data
            if self._in.reset:
                raise StreamReset("the peer reset the stream")
            if self._in.finished:
                return b""
            await self._in.changed.wait()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while True:
            if self._closed:
                raise StreamClosed("write after close")
            if self._out.reset or self._in.reset:
                raise StreamReset("the peer reset the stream")
            if not view or self._out.abandoned:
                return
            room = self._out.window - len(self._out.buffer)
            if room > 0:
                self._out.buffer += view[:room]
                view = view[room:]
                self._out.notify()
            else:
                await self._out.changed.wait()

    async def wait_ended(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._in.finished or self._in.reset):
            await self._in.changed.wait()

    def watch(self, notify: Callable[[], object] | None) -> None:
        self._in.watcher = notify
        self._in.notify()

    async def close(self) -> None:
        self._closed = True
        self._out.finished = True
        self._in.abandoned = True
        self._in.buffer.clear()
        self._out.notify()
        self._in.notify()

    async def reset(self) -> None:
        self._closed = True
        self._out.reset = True
        self._in.reset = True
        self._out.notify()
        self._in.notify()


def memory_stream_pair(
    client: PeerId, server: PeerId, protocol: str, *, window: int = 256 * 1024
) -> tuple[MemoryStream, MemoryStream]:
    """Return (the client's end, the server's end); each direction buffers at most ``window`` bytes."""
    up, down = _Pipe(window), _Pipe(window)
    return MemoryStream(server, protocol, down, up), MemoryStream(client, protocol, up, down)


def open_to_self(
    peer: PeerId, protocol: str, handlers: Mapping[str, StreamHandler], nursery: trio.Nursery
) -> Stream:
    """A stream from a host to itself; its handler runs in ``nursery``. Raises ProtocolNotSupported."""
    handler = handlers.get(protocol)
    if handler is None:
        raise ProtocolNotSupported(f"{peer} does not serve {protocol}")
    ours, theirs = memory_stream_pair(peer, peer, protocol)
    nursery.start_soon(_serve, handler, theirs)
    return ours


class MemoryNetwork:
    """Hosts of one process that reach each other without a socket; for simulations and tests.

    Handlers run in ``nursery``; a host in ``down`` can neither be reached nor reach others.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.hosts: dict[PeerId, MemoryHost] = {}
        self.down: set[PeerId] = set()
        self.changed = trio.Event()

    def take_down(self, peer: PeerId) -> None:
        """Cut a host off."""
        self.down.add(peer)
        self.changed.set()
        self.changed = trio.Event()

    def host(self, peer_id: PeerId) -> MemoryHost:
        self.hosts[peer_id] = host = MemoryHost(self, peer_id)
        return host


class MemoryHost(Host):
    """A host of a :class:`MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self._network = network
        self._handlers: dict[str, StreamHandler] = {}
        self._protection = Protection()

    def addresses(self) -> list[str]:
        return [f"/memory/0/p2p/{self.peer_id}"]

    def connected_peers(self) -> list[PeerId]:
        return [p for p in self._network.hosts if p != self.peer_id and p not in self._network.down]

    async def wait_disconnected(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        while peer in self.connected_peers():
            await self._network.changed.wait()

    def protect(self, peer: PeerId, tag: str) -> None:
        self._protection.add(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        self._protection.remove(peer, tag)

    def known_addresses(self, peer: PeerId) -> list[str]:
        return [f"/memory/0/p2p/{peer}"]

    def add_addresses(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Peers of one process need no addresses."""

    async def connect(self, address: str) -> PeerId:
        await trio.lowlevel.checkpoint()
        peer = PeerId.parse(address.rpartition("/p2p/")[2])
        self._reach(peer)
        return peer

    def _reach(self, peer: PeerId) -> MemoryHost:
        network = self._network
        if peer not in network.hosts or {peer, self.peer_id} & network.down:
            raise PeerUnreachable(f"{peer} is not on this network", hop="address")
        return network.hosts[peer]

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        remote = self._reach(peer)
        handler = remote._handlers.get(protocol)  # noqa: SLF001 - a host of the same network
        if handler is None:
            raise ProtocolNotSupported(f"{peer} does not serve {protocol}")
        ours, theirs = memory_stream_pair(self.peer_id, peer, protocol)
        self._network.nursery.start_soon(_serve, handler, theirs)
        return ours

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is served already")
        self._handlers[protocol] = handler

    def unserve(self, protocol: str) -> None:
        self._handlers.pop(protocol, None)


async def _serve(handler: StreamHandler, stream: Stream) -> None:
    try:
        await handler(stream)
    except (RemoteError, NetworkError) as e:
        log.debug("%s from %s: %s", stream.protocol, stream.remote, e)
        await stream.reset()
    except Exception:
        log.exception("handler of %s failed", stream.protocol)
        await stream.reset()
    else:
        await stream.close()
