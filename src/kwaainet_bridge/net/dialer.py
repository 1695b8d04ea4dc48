"""Dialling a peer: every address, one attempt per peer at a time, and a failure that says how far it came."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable, ProtocolNotSupported, RemoteError
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

HOPS: Final = ("address", "dns", "tcp", "noise", "yamux", "protocol")
"""The steps to a peer, in order."""

Upgrade = Callable[[trio.SocketStream, PeerId, "Progress"], Awaitable[YamuxConnection]]
"""Turns a TCP stream to a peer into a running connection, and names each hop as it begins."""


class Progress:
    """Which hop an attempt at one address is at."""

    def __init__(self) -> None:
        self.hop = "address"


class _Attempt:
    """One dial of one peer, which everybody who wants that peer waits for."""

    def __init__(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        self.peer = peer
        self.addresses = addresses
        self.done = trio.Event()
        self.connection: YamuxConnection | None = None
        self.failures: list[tuple[str, str]] = []  # hop, "address: what happened"

    def error(self) -> PeerUnreachable:
        hop = max((hop for hop, _ in self.failures), key=HOPS.index, default="address")
        reasons = "; ".join(text for _, text in self.failures) or "no address is known"
        return PeerUnreachable(f"cannot reach {self.peer} ({hop}): {reasons}", hop=hop)


class Dialer:
    """Dials in ``nursery``, so that a caller who is cancelled takes nothing from the others who wait."""

    def __init__(self, nursery: trio.Nursery, upgrade: Upgrade) -> None:
        self._nursery = nursery
        self._upgrade = upgrade
        self._attempts: dict[PeerId, _Attempt] = {}
        self._resolvers = trio.CapacityLimiter(defaults.RESOLVER_THREADS)

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> YamuxConnection:
        """Connect to ``peer`` at the first of ``addresses`` that answers.

        Attempts start 250 ms apart, or as soon as the one before failed. Raises PeerUnreachable with the
        furthest hop and what happened at each address. Cancelled: the attempt goes on for those who share it.
        """
        wanted = list(dict.fromkeys(addresses))[: defaults.MAX_DIAL_ADDRESSES]
        while True:
            attempt = self._attempts.get(peer)
            if attempt is None:
                attempt = self._attempts[peer] = _Attempt(peer, wanted)
                self._nursery.start_soon(self._run, attempt)
            await attempt.done.wait()
            if attempt.connection is not None:
                return attempt.connection
            if set(wanted) <= set(attempt.addresses):
                raise attempt.error()

    async def _run(self, attempt: _Attempt) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for address in attempt.addresses:
                    failed = trio.Event()
                    nursery.start_soon(self._try, attempt, address, failed, nursery.cancel_scope)
                    with trio.move_on_after(defaults.DIAL_STAGGER_SECONDS):
                        await failed.wait()
        finally:
            del self._attempts[attempt.peer]
            attempt.done.set()

    async def _try(
        self, attempt: _Attempt, address: Address, failed: trio.Event, others: trio.CancelScope
    ) -> None:
        progress = Progress()
        try:
            with trio.fail_after(defaults.DIAL_SECONDS):
                connection = await self._connect(attempt.peer, address, progress)
        except trio.TooSlowError:
            reason = f"no answer within {defaults.DIAL_SECONDS:g} s"
        except ProtocolNotSupported:
            reason = f"the peer does not speak {progress.hop}"
        except (OSError, NetworkError, RemoteError) as e:
            reason = str(e) or type(e).__name__
        except Exception as e:
            log.exception("dialling %s failed", address)
            reason = repr(e)
        else:
            if attempt.connection is None:
                attempt.connection = connection
            others.cancel()
            return
        attempt.failures.append((progress.hop, f"{address.transport}: {progress.hop}: {reason}"))
        failed.set()

    async def _connect(self, peer: PeerId, address: Address, progress: Progress) -> YamuxConnection:
        progress.hop = "dns" if address.protocol.startswith("dns") else "tcp"
        # The resolver of the system: it knows /etc/hosts, and literal addresses pass through it unchanged.
        # Peers announce names too: slow name servers must not hold up all threads of the process.
        async with self._resolvers:
            found = await trio.socket.getaddrinfo(
                address.host, address.port, family=address.family, type=trio.socket.SOCK_STREAM
            )
        progress.hop = "tcp"
        failure: OSError | None = None
        for family, _, _, _, target in found:
            try:
                stream = await _connect_tcp(family, target)
            except OSError as e:
                failure = e
            else:
                return await self._upgrade(stream, peer, progress)
        raise failure or OSError(f"{address.host} has no address")


async def _connect_tcp(family: int, target: tuple[str | int, ...]) -> trio.SocketStream:
    connection = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        await connection.connect(target)
        return trio.SocketStream(connection)
    except BaseException:
        connection.close()
        raise
