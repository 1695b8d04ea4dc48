"""What every simulated KwaaiNet node has: a host, its bootstrap peers, the DHT methods and the greeting."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

import trio
from sim_dht import DhtPeer
from sim_envelope import Handler, call_unary, unary_handler
from sim_messages import HELLO

from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity

_GOODBYE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0

P = TypeVar("P", bound="SimulatedPeer")


class SimulatedPeer:
    """One node.

    ``complaints`` tells what others did against the rules, as a strict Rust decoder sees it: a test of a well-behaved peer
    asserts that it is empty. ``greetings`` are the (peer id, text) that others sent.
    """

    host: Any
    dht: DhtPeer

    def __init__(
        self, *, bootstrap: Sequence[Any] = (), clock: Callable[[], float] = time.time, timeout: float = 10
    ) -> None:
        self.bootstrap = [getattr(b, "address", b) for b in bootstrap]
        self.clock = clock
        self.timeout = timeout
        self.identity = Identity.generate("ed25519")
        self.complaints: list[str] = []
        self.greetings: list[tuple[str, str]] = []
        self.bootstrap_peers: list[Any] = []
        self.unlisted: set[str] = set()  # more protocols that identify does not tell
        self.killed = False
        self._life = trio.CancelScope()
        self._ended = trio.Event()
        self._served: dict[str, Callable[[Any], Any]] = {}

    @property
    def peer_id(self) -> str:
        """In base58."""
        return str(self.identity.peer_id)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.host.addresses()[0]

    # --- life

    async def run(self, task_status: trio.TaskStatus[Self] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on 127.0.0.1, join the bootstrap peers, and serve until cancelled or killed."""
        with self._life:
            async with open_host(HostConfig(self.identity)) as host, trio.open_nursery() as nursery:
                self.host = host
                # Rust peers leave ids without a leading slash out of identify.
                handlers = host.introductions._protocols
                host.introductions._protocols = lambda: [
                    p for p in handlers() if p.startswith("/") and p not in self.unlisted
                ]
                self.dht = DhtPeer(
                    host, clock=self.clock, complain=self.complaints.append, timeout=self.timeout
                )
                self.serve(HELLO, self._hello)
                self.mount()
                await self.join()
                await self.start(nursery)
                task_status.started(self)
                await trio.sleep_forever()
        self._ended.set()

    def mount(self) -> None:
        """Serve more."""

    async def start(self, nursery: trio.Nursery) -> None:
        """Begin what goes on in the background; returns when the node is ready."""

    async def leave(self) -> None:
        """Say goodbye."""

    async def join(self) -> None:
        """Connect to every bootstrap peer, and ping it as a node that can be called."""
        peers = []
        for address in self.bootstrap:
            with trio.fail_after(_CONNECT_SECONDS):
                peer = await self.host.connect(address)
            self.host.protect(peer, "bootstrap")
            await self.dht.ping(peer, validate=True)
            peers.append(peer)
        self.bootstrap_peers = peers

    async def kill(self) -> None:
        """Die at once: connections end, nothing is withdrawn."""
        self.killed = True
        self._life.cancel()
        await self._ended.wait()

    # --- serving and calling

    def serve(self, protocol: str, handler: Handler, send: Callable[[Any, bytes], Any] | None = None) -> None:
        """Serve a unary method."""
        self.serve_stream(protocol, unary_handler(handler, self.complaints.append, send))

    def serve_stream(self, protocol: str, handler: Callable[[Any], Any]) -> None:
        self._served[protocol] = handler
        self.host.serve(protocol, handler)

    def refuse(self, protocol: str) -> None:
        """Answer ``na`` to ``protocol`` from now on."""
        self.host.unserve(protocol)

    def accept(self, protocol: str) -> None:
        """Undo :meth:`refuse`."""
        self.host.serve(protocol, self._served[protocol])

    def peer(self, peer_id: Any) -> Any:
        """The host's form of a peer id in base58; whatever else has a ``peer_id`` is taken by that."""
        text = getattr(peer_id, "peer_id", peer_id)
        return type(self.identity.peer_id).parse(str(text))

    async def call(self, peer: Any, protocol: str, body: bytes) -> bytes:
        return await call_unary(self.host, self.peer(peer), protocol, body, timeout=self.timeout)

    async def hello(self, peer: Any, text: str = "hello") -> str:
        """Greet a peer; its reply, which should be ``ok``."""
        return (await self.call(peer, HELLO, text.encode())).decode()

    async def _hello(self, remote: Any, body: bytes) -> bytes:
        try:
            self.greetings.append((str(remote), body.decode()))
        except UnicodeDecodeError:
            self.complaints.append(f"{HELLO} from {remote}: not UTF-8")
        return b"ok"


@asynccontextmanager
async def running(peer: P) -> AsyncIterator[P]:
    """Run ``peer`` for the block; at its end the peer says goodbye, unless it was killed."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(peer.run)
            try:
                yield peer
            finally:
                if not peer.killed:
                    with trio.move_on_after(_GOODBYE_SECONDS):
                        await peer.leave()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
