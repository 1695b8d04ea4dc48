"""Dialling a peer: every address, one attempt per peer at a time, and a failure that says how far it came.

Several addresses are raced as RFC 8305 has it: names are resolved side by side, the families take turns with
IPv6 first, and the next attempt begins a quarter of a second after the last, or when that has failed. Public
addresses and names come before private ones, which mean something in one network only, and those before relayed
ones.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable, ProtocolNotSupported, RemoteError
from kwaainet_bridge.net.addresses import Address, private_block
from kwaainet_bridge.net.channel import RawChannel, WrongPeer
from kwaainet_bridge.net.dial_history import DialHistory, HopTimes
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

HOPS: Final = ("address", "dns", "tcp", "relay", "noise", "yamux", "protocol")
"""The steps to a peer, in order."""

Target = tuple[str | int, ...]
"""What a socket connects to: host, port, and for IPv6 flow and scope."""

Upgrade = Callable[[RawChannel, PeerId, "Progress"], Awaitable[YamuxConnection]]
"""Turns a channel to a peer into a running connection, and names each hop as it begins."""

Connect = Callable[[int, Target], Awaitable[RawChannel]]
"""Opens a TCP connection, given the family and the target. Raises OSError."""

ConnectThrough = Callable[[Address, PeerId], Awaitable[RawChannel]]
"""Has the relay of a relayed address connect to a peer. Raises NetworkError or RemoteError."""


class HostFull(NetworkError):
    """This host has no room for another connection; that says nothing about the peer."""


class Progress:
    """Which hop an attempt at one address is at, and how long each one took."""

    def __init__(self, hop: str = "tcp") -> None:
        self.hop = hop
        self._began = trio.current_time()
        self._passed: HopTimes = ()

    def enter(self, hop: str) -> None:
        """Note that the hop before is done and that ``hop`` begins."""
        self._passed = self.times()
        self.hop, self._began = hop, trio.current_time()

    def times(self) -> HopTimes:
        """The hops so far; of the last one the time until now."""
        return (*self._passed, (self.hop, trio.current_time() - self._began))


class _Tier(enum.IntEnum):
    """In which order addresses are tried."""

    PUBLIC = 0
    PRIVATE = 1
    RELAYED = 2


@dataclass(frozen=True)
class _Endpoint:
    """One socket address behind ``address``."""

    address: Address
    family: int
    target: Target

    @property
    def tier(self) -> _Tier:
        if self.address.relay is not None:
            return _Tier.RELAYED
        return _Tier.PUBLIC if private_block(str(self.target[0])) is None else _Tier.PRIVATE

    def __str__(self) -> str:
        host = self.target[0]
        return str(self.address) if host == self.address.host else f"{self.address} ({host})"


class _Candidates:
    """Endpoints that were not tried yet, in the order in which they should be."""

    def __init__(self) -> None:
        self._queues: dict[tuple[_Tier, bool], deque[_Endpoint]] = {
            (tier, ipv6): deque() for tier in _Tier for ipv6 in (False, True)
        }
        self._seen: set[Target] = set()
        self._ipv6_next = True

    def add(self, endpoint: _Endpoint) -> bool:
        """Take an endpoint; False if it is among them already."""
        if endpoint.target in self._seen:
            return False
        self._seen.add(endpoint.target)
        self._queues[endpoint.tier, endpoint.family == trio.socket.AF_INET6].append(endpoint)
        return True

    def next(self, last: _Tier) -> _Endpoint | None:
        """The next one to try, of those up to the tier ``last``."""
        for tier in _Tier:
            if tier > last:
                break
            for ipv6 in (self._ipv6_next, not self._ipv6_next):
                if queue := self._queues[tier, ipv6]:
                    self._ipv6_next = not ipv6
                    return queue.popleft()
        return None


@dataclass
class _Attempt:
    """One dial of one peer, which everybody who wants that peer waits for."""

    peer: PeerId
    addresses: Sequence[Address]
    anyway: bool
    done: trio.Event = field(default_factory=trio.Event)
    connection: YamuxConnection | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)  # hop, "address: hop: what happened"
    left_out: bool = False  # addresses that failed lately
    full: HostFull | None = None

    candidates: _Candidates = field(default_factory=_Candidates)
    resolving: int = 0
    resolved: trio.Event = field(default_factory=trio.Event)
    untried: dict[Address, int] = field(default_factory=dict)  # endpoints that have not failed yet
    # furthest hop, what happened, and the way there
    worst: dict[Address, tuple[str, str, HopTimes]] = field(default_factory=dict)
    lookups: dict[Address, HopTimes] = field(default_factory=dict)  # of names that were resolved

    def error(self) -> NetworkError:
        if self.full is not None:
            return PeerUnreachable(f"cannot reach {self.peer}: {self.full}", hop="address")
        hop = max((hop for hop, _ in self.failures), key=HOPS.index, default="address")
        reasons = "; ".join(text for _, text in self.failures) or "no address is known"
        return PeerUnreachable(f"cannot reach {self.peer} ({hop}): {reasons}", hop=hop)


@dataclass(eq=False)
class _Lookup:
    """A name that the system resolves, whether anybody still waits for it or not."""

    address: Address
    done: trio.Event = field(default_factory=trio.Event)
    found: list[tuple[int, Target]] = field(default_factory=list)
    error: OSError | UnicodeError | None = None


class Dialer:
    """Dials in ``nursery``, so that a caller who is cancelled takes nothing from the others who wait.

    ``misplaced`` is told of a peer and an address of its at which another peer answers.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        upgrade: Upgrade,
        *,
        misplaced: Callable[[PeerId, Address], None],
        connect: Connect,
        connect_through: ConnectThrough,
        history: DialHistory | None = None,
    ) -> None:
        self.history = DialHistory() if history is None else history
        self._nursery = nursery
        self._upgrade = upgrade
        self._misplaced = misplaced
        self._connect = connect
        self._connect_through = connect_through
        self._attempts: dict[PeerId, _Attempt] = {}
        self._resolvers = trio.CapacityLimiter(defaults.RESOLVER_THREADS)

    async def dial(
        self, peer: PeerId, addresses: Sequence[Address], *, anyway: bool = False
    ) -> YamuxConnection:
        """Connect to ``peer`` at the first of ``addresses`` that answers.

        Addresses that failed lately are left out, unless this is to happen ``anyway``: then their failures are
        forgotten. Raises PeerUnreachable with the furthest hop and what happened at each address.
        Cancelled: the attempt goes on for those who share it.
        """
        wanted = _few(dict.fromkeys(a.without_peer() for a in addresses))
        while True:
            attempt = self._attempts.get(peer)
            if attempt is None:
                attempt = self._attempts[peer] = _Attempt(peer, wanted, anyway)
                self._nursery.start_soon(self._run, attempt)
            await attempt.done.wait()
            if attempt.connection is not None:
                return attempt.connection
            if set(wanted) <= set(attempt.addresses) and not (anyway and attempt.left_out):
                raise attempt.error()

    async def _run(self, attempt: _Attempt) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for address in self._due(attempt):
                    if address.relay is not None:
                        relayed = (address.host, address.port, str(address.relay))
                        self._add(attempt, address, [(address.family, relayed)])
                    elif address.is_name:
                        attempt.resolving += 1
                        nursery.start_soon(self._resolve, attempt, address)
                    else:
                        self._add(attempt, address, [(address.family, (address.host, address.port))])
                while (endpoint := await _next(attempt)) is not None:
                    failed = trio.Event()
                    nursery.start_soon(self._try, attempt, endpoint, failed, nursery.cancel_scope)
                    with trio.move_on_after(defaults.DIAL_STAGGER_SECONDS):
                        await failed.wait()
        finally:
            del self._attempts[attempt.peer]
            attempt.done.set()

    def _due(self, attempt: _Attempt) -> Iterator[Address]:
        if attempt.anyway:
            self.history.forgive(attempt.peer, attempt.addresses)
        for address in attempt.addresses:
            last = self.history.waiting(attempt.peer, address)
            if last is None:
                yield address
            else:
                attempt.left_out = True
                wait = self.history.seconds_left(last)
                text = f"{address}: {last.hop}: {last.error}; tried again in {wait:.0f} s"
                attempt.failures.append((last.hop, text))

    @staticmethod
    def _add(attempt: _Attempt, address: Address, targets: Sequence[tuple[int, Target]]) -> None:
        added = [attempt.candidates.add(_Endpoint(address, *target)) for target in targets]
        attempt.untried[address] = sum(added)

    async def _resolve(self, attempt: _Attempt, address: Address) -> None:
        began = trio.current_time()
        try:
            with trio.fail_after(defaults.DIAL_SECONDS):
                found = await self._look_up(address)
        except trio.TooSlowError:
            self._unresolved(attempt, address, began, f"no answer within {defaults.DIAL_SECONDS:g} s")
        except (OSError, UnicodeError) as e:
            self._unresolved(attempt, address, began, str(e) or type(e).__name__)
        else:
            attempt.lookups[address] = (("dns", trio.current_time() - began),)
            self._add(attempt, address, found[: defaults.MAX_ENDPOINTS_PER_NAME])
        finally:
            attempt.resolving -= 1
            attempt.resolved.set()
            attempt.resolved = trio.Event()

    async def _look_up(self, address: Address) -> list[tuple[int, Target]]:
        # A lookup cannot be stopped, only left alone, and then goes on to hold one of the process's threads. So
        # it keeps its place until it ends: peers announce names too, and choose how slow their servers are.
        lookup = _Lookup(address)
        await self._resolvers.acquire_on_behalf_of(lookup)
        self._nursery.start_soon(self._ask, lookup)
        await lookup.done.wait()
        if lookup.error is not None:
            raise lookup.error
        return lookup.found

    async def _ask(self, lookup: _Lookup) -> None:
        # The resolver of the system: it knows /etc/hosts.
        address = lookup.address
        try:
            found = await trio.socket.getaddrinfo(
                address.host, address.port, family=address.family, type=trio.socket.SOCK_STREAM
            )
            lookup.found = [(family, target) for family, _, _, _, target in found]
        except (OSError, UnicodeError) as e:
            lookup.error = e
        finally:
            self._resolvers.release_on_behalf_of(lookup)
            lookup.done.set()

    def _note(self, attempt: _Attempt, address: Address, hop: str, error: str) -> None:
        attempt.failures.append((hop, f"{address}: {hop}: {error}"))
        self.history.failed(attempt.peer, address, hop, error)

    def _unresolved(self, attempt: _Attempt, address: Address, began: float, error: str) -> None:
        attempt.failures.append(("dns", f"{address}: dns: {error}"))
        times = (("dns", trio.current_time() - began),)
        self.history.failed(attempt.peer, address, "dns", error, times)

    async def _try(
        self, attempt: _Attempt, endpoint: _Endpoint, failed: trio.Event, others: trio.CancelScope
    ) -> None:
        address = endpoint.address
        progress = Progress("tcp" if address.relay is None else "relay")
        lookup = attempt.lookups.get(address, ())
        try:
            with trio.fail_after(defaults.DIAL_SECONDS):
                if address.relay is None:
                    channel = await self._connect(endpoint.family, endpoint.target)
                else:
                    channel = await self._connect_through(address, attempt.peer)
                connection = await self._upgrade(channel, attempt.peer, progress)
        except HostFull as e:
            attempt.full = e
            others.cancel()
            return
        except trio.TooSlowError:
            reason = f"no answer within {defaults.DIAL_SECONDS:g} s"
        except ProtocolNotSupported:
            reason = f"the peer does not speak {progress.hop}"
        except WrongPeer as e:
            reason = str(e)
            self._misplaced(attempt.peer, address)
        except (OSError, NetworkError, RemoteError) as e:
            reason = str(e) or type(e).__name__
        except Exception as e:
            log.exception("dialling %s failed", address)
            reason = repr(e)
        else:
            if attempt.connection is None:
                attempt.connection = connection
            self.history.succeeded(attempt.peer, address, (*lookup, *progress.times()))
            others.cancel()
            return
        attempt.failures.append((progress.hop, f"{endpoint}: {progress.hop}: {reason}"))
        attempt.untried[address] -= 1
        hop, *_ = attempt.worst.get(address, ("address",))
        if HOPS.index(progress.hop) >= HOPS.index(hop):
            attempt.worst[address] = (progress.hop, reason, (*lookup, *progress.times()))
        if not attempt.untried[address]:
            self.history.failed(attempt.peer, address, *attempt.worst[address])
        failed.set()


async def _next(attempt: _Attempt) -> _Endpoint | None:
    """The next endpoint to try, None when all were; waits for names if need be."""
    while True:
        endpoint = attempt.candidates.next(_Tier.PUBLIC if attempt.resolving else _Tier.RELAYED)
        if endpoint is not None or not attempt.resolving:
            return endpoint
        # A name may stand for a public address, which goes first, if it is not too slow to resolve.
        with trio.move_on_after(defaults.DIAL_STAGGER_SECONDS) as waiting:
            await attempt.resolved.wait()
        if waiting.cancelled_caught and (endpoint := attempt.candidates.next(_Tier.RELAYED)) is not None:
            return endpoint


def _few(addresses: Iterable[Address]) -> list[Address]:
    """As many as one dial tries; of a peer with many interfaces, relayed ones, which come last, too."""
    addresses = list(addresses)
    relayed = [a for a in addresses if a.relay is not None][: defaults.MAX_DIAL_ADDRESSES // 2]
    direct = [a for a in addresses if a.relay is None]
    return [*direct[: defaults.MAX_DIAL_ADDRESSES - len(relayed)], *relayed]
