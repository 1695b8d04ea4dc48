"""Places at relays, for a host that cannot be dialled: reserved, renewed, and moved when a relay fails."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError
from kwaainet_bridge.net.addresses import (
    Address,
    parse_binary_address,
    private_block,
    public_first,
    split_peer_address,
)
from kwaainet_bridge.net.circuit import ask_hop
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import HOP, CircuitLimit, HopMessage, HopType
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_TAG = "relay"


class RelayedHost(Protocol):
    """What is asked of the host."""

    async def connect(self, address: str) -> PeerId:
        """Connect to a relay at a full address."""

    async def open_direct_stream(
        self, peer: PeerId, addresses: Sequence[Address], protocol: str
    ) -> YamuxStream:
        """Open a stream without a relay or a lookup."""

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""

    def direct_peers(self, protocol: str) -> list[PeerId]:
        """Peers that serve ``protocol`` and are connected without a relay."""

    def where(self, peer: PeerId) -> list[Address]:
        """Where ``peer`` may be dialled."""

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer``."""

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo :meth:`protect`."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at ``relay`` until ``expires`` (unix seconds).

    ``addresses`` lead here through it. ``limit`` is what it carries in one circuit; None if it says nothing of that.
    """

    relay: PeerId
    expires: float
    addresses: tuple[Address, ...]
    limit: CircuitLimit | None


async def reserve(host: RelayedHost, relay: PeerId) -> Reservation:
    """Ask a connected relay for a place. Raises RelayRefused, RemoteError or another NetworkError."""
    try:
        with trio.fail_after(defaults.RELAY_ANSWER_SECONDS):
            stream = await host.open_direct_stream(relay, (), HOP)
            try:
                answer = await ask_hop(stream, HopMessage(HopType.RESERVE), "reserve a place")
            finally:
                stream.close_now()
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"relay {relay}: no answer within {defaults.RELAY_ANSWER_SECONDS:g} s"
        ) from None
    if answer.expires is None:
        raise RemoteError(f"relay {relay}: granted a place without saying until when")
    named = [parse_binary_address(a) for a in answer.addresses[: defaults.MAX_ADDRESSES_PER_PEER]]
    direct = [a for a in named if a is not None and a.relay is None and a.port]
    # stock relays name their public addresses only, so none at all in a private network
    direct = direct or [a for a in host.where(relay) if a.relay is None]
    addresses = dict.fromkeys(a.through(relay) for a in public_first(direct)[: defaults.MAX_RELAY_ADDRESSES])
    if not addresses:
        raise RemoteError(f"relay {relay}: granted a place, and nobody knows where it is")
    return Reservation(relay, float(answer.expires), tuple(addresses), answer.limit)


class RelayKeeper:
    """Holds places at ``defaults.RELAYS_WANTED`` relays while they are wanted.

    ``preferred`` are full addresses of relays that are tried first; the others are connected peers that offer to
    relay. ``changed`` is called whenever :attr:`reservations` has changed. ``clock`` tells unix time.
    :meth:`run` must be running.
    """

    def __init__(
        self,
        host: RelayedHost,
        *,
        preferred: Sequence[str] = (),
        changed: Callable[[], None],
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._host = host
        self._preferred = {split_peer_address(address)[0]: address for address in preferred}
        self._changed = changed
        self._clock = clock
        self._rng = random.Random() if rng is None else rng
        self._wanted = trio.Event()
        self._holders: dict[PeerId, trio.CancelScope] = {}
        self._held: dict[PeerId, Reservation] = {}
        self._next_try: dict[PeerId, float] = {}
        self._offering: set[PeerId] = set()  # at the last look
        self._attention = trio.Event()

    @property
    def reservations(self) -> list[Reservation]:
        """The places that are held now."""
        return list(self._held.values())

    @property
    def addresses(self) -> list[Address]:
        """The addresses that lead here through them."""
        return [address for held in self._held.values() for address in held.addresses]

    def holds(self, relay: PeerId) -> bool:
        """Whether a place is held at ``relay``, or is being asked for."""
        return relay in self._holders

    def want(self, wanted: bool) -> None:
        """Begin to hold places, or give them up."""
        if wanted and not self._wanted.is_set():
            self._wanted.set()
        elif not wanted and self._wanted.is_set():
            self._wanted = trio.Event()
            for scope in self._holders.values():
                scope.cancel()

    async def run(self) -> None:
        """Reserve and renew until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wanted.wait()
                self._attention = trio.Event()
                self._leave_those_that_relay_no_more()
                if len(self._holders) < defaults.RELAYS_WANTED:
                    for relay in self._candidates()[: defaults.RELAYS_WANTED - len(self._holders)]:
                        self._holders[relay] = trio.CancelScope()
                        nursery.start_soon(self._hold, relay)
                with trio.move_on_after(defaults.RELAY_LOOK_SECONDS):
                    await self._attention.wait()

    def _leave_those_that_relay_no_more(self) -> None:
        # it keeps the place, and refuses whoever asks for the way here
        before, self._offering = self._offering, set(self._host.direct_peers(HOP))
        for relay in before - self._offering:
            if relay in self._holders:
                log.info("relay %s offers to relay no more", relay)
                self._holders[relay].cancel()

    def _candidates(self) -> list[PeerId]:
        others = [peer for peer in self._host.direct_peers(HOP) if peer not in self._preferred]
        self._rng.shuffle(others)
        others.sort(key=self._is_private)
        now = trio.current_time()
        self._next_try = {relay: then for relay, then in self._next_try.items() if then > now}
        return [
            relay
            for relay in (*self._preferred, *others)
            if relay not in self._holders and relay not in self._next_try
        ]

    def _is_private(self, relay: PeerId) -> bool:
        """Whether it leads here for its own network only, as far as it says where it is."""
        where = [address for address in self._host.where(relay) if address.relay is None]
        return all(private_block(address.host) is not None for address in where)

    async def _hold(self, relay: PeerId) -> None:
        self._host.protect(relay, _TAG)
        began = trio.current_time()
        try:
            with self._holders[relay]:
                await self._renew_while_connected(relay)
        finally:
            self._host.unprotect(relay, _TAG)
            del self._holders[relay]
            self._next_try[relay] = began + defaults.RELAY_RETRY_SECONDS
            if self._held.pop(relay, None) is not None:
                self._changed()
            self._attention.set()

    async def _renew_while_connected(self, relay: PeerId) -> None:
        if relay in self._preferred:
            try:
                await self._host.connect(self._preferred[relay])
            except NetworkError as e:
                log.info("no place at relay %s: %s", relay, e)
                return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew, relay, nursery.cancel_scope)
            await self._host.wait_disconnected(relay)
            log.info("lost relay %s", relay)
            nursery.cancel_scope.cancel()

    async def _renew(self, relay: PeerId, holding: trio.CancelScope) -> None:
        while True:
            try:
                granted = await reserve(self._host, relay)
            except (NetworkError, RemoteError) as e:
                log.info("no place at relay %s: %s", relay, e)
                holding.cancel()
                return
            before, self._held[relay] = self._held.get(relay), granted
            if before is None:
                log.info("reached through relay %s, %s", relay, _in_words(granted.limit))
            if before is None or before.addresses != granted.addresses:
                self._changed()
            # a relay's clock may be wrong, and longer places than an hour are not usual
            left = min(granted.expires - self._clock(), defaults.RELAY_RESERVATION_SECONDS)
            await trio.sleep(
                max(left - defaults.RELAY_RENEWAL_SECONDS, left / 2, defaults.RELAY_LOOK_SECONDS)
            )


def _in_words(limit: CircuitLimit | None) -> str:
    if limit is None or not (limit.seconds or limit.data_bytes):
        return "without limits"
    seconds = f"{limit.seconds} s" if limit.seconds else "any time"
    size = f"{limit.data_bytes / 2**20:.1f} MiB" if limit.data_bytes else "any number of bytes"
    return f"which carries {size} and {seconds} in one circuit"
