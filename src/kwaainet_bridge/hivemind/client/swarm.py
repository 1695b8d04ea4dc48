"""What a client knows of the servers of one model: spans, round trips, failures, compressions."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    CapacityDenied,
    DeadlineExceeded,
    LeaseDenied,
    NetworkError,
    NoRoute,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    StreamReset,
    WarmingUp,
)
from kwaainet_bridge.hivemind.client.calls import ServerTraits, fetch_traits
from kwaainet_bridge.hivemind.client.directory import PETALS, Directory, Span
from kwaainet_bridge.hivemind.client.history import History
from kwaainet_bridge.hivemind.client.part import OtherNetwork, Part, SessionShape
from kwaainet_bridge.hivemind.client.routing import Bans, Hop, fastest_chain, random_chain
from kwaainet_bridge.hivemind.client.snapshots import AvoidedServer, ClientSession
from kwaainet_bridge.hivemind.client.span_session import SpanSession
from kwaainet_bridge.hivemind.experts.records import block_uid
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_LOST = (PeerUnreachable, StreamReset, StreamClosed, DeadlineExceeded)
"""Errors after which a peer may be gone. After others it has answered."""

Ping = Callable[[PeerId], Awaitable[object]]
"""Returns once the peer answered, raises NetworkError or RemoteError if it does not."""


class Describable(Protocol):
    """A session, as far as people are told of it."""

    def snapshot(self) -> ClientSession: ...


class Swarm:
    """The servers of one model, as far as this client has learned about them.

    Reads the records when a route is asked for and they are old, or do not suffice; owns no task. ``ping``
    measures round trips (``DhtNode.ping``); without it all servers count as equally far. ``clock`` gives
    seconds from any origin. ``others`` are networks in which the model is served, too: sessions with its ends use
    their servers as well. May be shared by any number of sessions and requests.
    """

    def __init__(
        self,
        rpc: RpcClient,
        directory: Directory,
        *,
        ping: Ping | None = None,
        others: Sequence[OtherNetwork] = (),
        rng: random.Random | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.rpc = rpc
        self.prefix = directory.prefix
        self.num_blocks = directory.num_blocks
        self.adapter = directory.adapter
        self._directory = directory
        self._ping = ping
        self._others = {network.name: network for network in others}
        self._rng = rng or random.Random()
        self._clock = clock
        self._spans: list[Span] = []
        self._rtts: dict[PeerId, float] = {}
        self._traits: dict[PeerId, ServerTraits] = {}
        self._bans = Bans()
        self._sessions: dict[Describable, None] = {}
        self._read_at = -math.inf
        self._readings = 0
        self._reading = trio.Lock()

    @property
    def spans(self) -> list[Span]:
        """The spans of the latest reading, banned servers included."""
        return list(self._spans)

    @property
    def now(self) -> float:
        """The time by its clock."""
        return self._clock()

    @contextmanager
    def using(self, session: Describable) -> Iterator[None]:
        """Count a session among :meth:`sessions` for the length of the block."""
        self._sessions[session] = None
        try:
            yield
        finally:
            del self._sessions[session]

    def sessions(self) -> list[ClientSession]:
        """Those that are open, oldest first."""
        return [session.snapshot() for session in self._sessions]

    def avoided(self) -> list[AvoidedServer]:
        """Servers that failed lately, or said that they are full, as long as they are not called."""
        now = self._clock()
        return [
            AvoidedServer(peer, network, until - now, reason)
            for (peer, network), until, reason in self._bans.lasting(now)
        ]

    def uid(self, blocks: range) -> str:
        """The name of consecutive blocks in a request."""
        return " ".join(block_uid(self.prefix, block) for block in blocks)

    async def session_chain(
        self, blocks: range, cache_tokens: int, *, ends: bool = False, instead: range | None = None
    ) -> list[Hop]:
        """The chain with the lowest latency; ``cache_tokens`` is batch times maximum length.

        Of all networks for a session with the model's ``ends``, else of Petals alone. Where no chain runs ``blocks``,
        one over the blocks ``instead`` will do. Raises NoRoute naming the blocks without a server, or what the DHT
        raises.
        """

        def choose(spans: list[Span]) -> list[Hop]:
            usable = spans if ends else _of_petals(spans)
            chain_over = partial(
                fastest_chain, usable, model=self.prefix, rtts=self._rtts, cache_tokens=cache_tokens
            )
            try:
                return chain_over(blocks)
            except NoRoute:
                if instead is not None:
                    with contextlib.suppress(NoRoute):
                        return chain_over(instead)
                raise

        return await self._choose(choose)

    async def request_chain(self, blocks: range) -> list[Hop]:
        """A random chain for forward and backward, weighted by throughput. Raises like session_chain."""
        return await self._choose(
            lambda spans: random_chain(
                _of_petals(spans), blocks, model=self.prefix, rtts=self._rtts, rng=self._rng
            )
        )

    async def _choose(self, choose: Callable[[list[Span]], list[Hop]]) -> list[Hop]:
        await self.refresh(max_age=defaults.DIRECTORY_SECONDS)
        try:
            chain = choose(self._unbanned())
        except NoRoute:
            await self.refresh()
        else:
            if not any(math.isinf(self._rtts.get(hop.peer, 0.0)) for hop in chain):
                return chain
            # no better one than over a server that did not answer when it was last heard of
            await self.refresh(max_age=defaults.DOUBTFUL_DIRECTORY_SECONDS)
        try:
            return choose(self._unbanned())
        except NoRoute:
            # a server that failed may be back, and nobody else is there
            return choose(self._shuffled(self._spans))

    def _unbanned(self) -> list[Span]:
        now = self._clock()
        return self._shuffled(
            [span for span in self._spans if not self._bans.includes((span.peer, span.network), now)]
        )

    def _shuffled(self, spans: list[Span]) -> list[Span]:
        """In random order: among equals the first is chosen, and not by every client the same."""
        return self._rng.sample(spans, len(spans))

    async def refresh(self, *, max_age: float = 0.0) -> None:
        """Read the records again unless they are younger than ``max_age`` seconds.

        When the DHT cannot be read, the known spans stay in use; without any, its error is raised.
        """
        readings = self._readings
        async with self._reading:
            # whoever waited for another task's reading need not repeat it
            if self._readings != readings or self._clock() - self._read_at < max_age:
                return
            await self._read_all()
            self._read_at = self._clock()
            self._readings += 1
            log.debug("%s: %d servers online", self.prefix, len(self._spans))
            await self._measure()

    async def _read_all(self) -> None:
        """Read all networks at once; of those that cannot be read the known spans stay."""
        sources = {PETALS: self._directory.read} | {n.name: n.read for n in self._others.values()}
        found: dict[str, list[Span]] = {}
        errors: list[Exception] = []

        async def read(name: str, source: Callable[[], Awaitable[list[Span]]]) -> None:
            try:
                found[name] = await self._read(source)
            except (NetworkError, RemoteError) as e:
                known = [span for span in self._spans if span.network == name]
                log.warning("%s: %s: keeping %d known servers: %s", self.prefix, name, len(known), e)
                found[name] = known
                errors.append(e)

        async with trio.open_nursery() as nursery:
            for name, source in sources.items():
                nursery.start_soon(read, name, source)
        spans = [span for name in sources for span in found[name]]
        if errors and not spans:
            raise errors[0]
        self._spans = spans

    async def _read(self, source: Callable[[], Awaitable[list[Span]]]) -> list[Span]:
        with trio.move_on_after(defaults.DIRECTORY_READ_SECONDS):
            return await source()
        raise DeadlineExceeded(
            f"{self.prefix}: the DHT gave no block records within {defaults.DIRECTORY_READ_SECONDS:g} s"
        )

    async def _measure(self) -> None:
        """Ping some servers, unmeasured ones first; the rest keep what was measured before."""
        present = {span.peer for span in self._spans}
        self._rtts = {peer: rtt for peer, rtt in self._rtts.items() if peer in present}
        if self._ping is None:
            self._rtts.clear()  # nobody will say that one is back
            return
        pings: dict[PeerId, Ping] = {}
        for span in self._shuffled(self._spans):
            other = self._others.get(span.network)
            pings.setdefault(span.peer, self._ping if other is None else other.ping)
        peers = sorted(pings, key=lambda peer: peer in self._rtts)
        silent = set(peers[: defaults.MAX_PINGED_SERVERS])
        with trio.move_on_after(defaults.PING_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in list(silent):
                    nursery.start_soon(self._measure_one, pings[peer], peer, silent)
        for peer in silent:
            self._rtts[peer] = math.inf

    async def _measure_one(self, ping: Ping, peer: PeerId, silent: set[PeerId]) -> None:
        start = self._clock()
        try:
            await ping(peer)
        except ProtocolNotSupported:
            pass  # alive: servers behind a relay run the DHT in client mode and serve no ping
        except (NetworkError, RemoteError) as e:
            log.debug("ping of %s failed: %s", peer, e)
            return
        rtt = self._clock() - start
        known = self._rtts.get(peer, math.inf)
        self._rtts[peer] = rtt if math.isinf(known) else 0.8 * known + 0.2 * rtt
        silent.discard(peer)

    def note_failure(self, hop: Hop, error: Exception) -> None:
        """A call to a server failed: avoid it for a while, and ask it again what it is.

        One that is full, or not ready yet, is well: it is left alone for as long as it says, and nothing is held
        against it.
        """
        if isinstance(error, WarmingUp | LeaseDenied):
            pause = error.retry_after if isinstance(error, CapacityDenied) else defaults.BAN_SECONDS
            self._bans.pause(hop.key, self._clock() + pause, str(error))
            return
        self._bans.add(hop.key, self._clock(), str(error) or type(error).__name__)
        self._traits.pop(hop.peer, None)
        if isinstance(error, _LOST):  # whatever it serves, in any network: it comes last until it is heard of
            self._rtts[hop.peer] = math.inf

    def note_success(self, hop: Hop) -> None:
        self._bans.lift(hop.key)
        if math.isinf(self._rtts.get(hop.peer, 0.0)):
            del self._rtts[hop.peer]

    def part(self, hop: Hop, shape: SessionShape, history: History, *, new_id: Callable[[], str]) -> Part:
        """One server's part of a session, in the way of its network."""
        other = self._others.get(hop.network)
        if other is None:
            return SpanSession(self, hop, shape, history, new_id=new_id)
        return other.part(hop, shape, history)

    async def traits(self, hop: Hop) -> ServerTraits:
        """What a server says of itself; asked once. Raises NetworkError or RemoteError."""
        known = self._traits.get(hop.peer)
        if known is None:
            uid = block_uid(self.prefix, hop.blocks.start)
            known = self._traits[hop.peer] = await fetch_traits(self.rpc, hop.peer, uid)
        return known


def _of_petals(spans: Sequence[Span]) -> list[Span]:
    return [span for span in spans if span.network == PETALS]
