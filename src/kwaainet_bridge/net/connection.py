"""One live connection, and what is known of its other end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

import trio

from kwaainet_bridge.net.addresses import Address, parse_binary_address
from kwaainet_bridge.net.channel import SecureChannel
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import GO_AWAY, INITIAL_WINDOW, NORMAL_TERMINATION
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import DCUTR, HOP, STOP

YAMUX = "/yamux/1.0.0"

_RELAYING: Final = frozenset({DCUTR, HOP, STOP})
"""Whoever looks for a relay tries all that it meets, so these tell nothing about what its peer wants."""


class Connection(YamuxConnection):
    """A yamux connection, and what is known of its other end.

    ``remote_address`` is the binary multiaddr it came from or goes to, ``remote_host`` the IP address in it; both are
    empty for one that ``relay`` carries. ``local_port`` is this end's. ``origin`` is who answers for an inbound one;
    ``identified`` is set once the peer has said who it is, or has failed to. Streams of ``housekeeping`` protocols do
    not count as use.
    """

    security: Final = "/noise (X25519, ChaCha20-Poly1305, SHA-256)"
    """The only one that is offered or accepted, with its only cipher."""
    muxer: Final = YAMUX

    def __init__(
        self,
        channel: SecureChannel,
        *,
        initiator: bool,
        accept: Callable[[Connection, YamuxStream], None],
        memory: FairPool,
        housekeeping: AbstractSet[str] = frozenset(),
        origin: str | None = None,
    ) -> None:
        super().__init__(
            channel, channel.remote, initiator=initiator, accept=lambda stream: accept(self, stream)
        )
        self.identified = trio.Event()
        self.remote_address = channel.socket.remote_address
        self.remote_host = channel.socket.remote_host
        self.local_port = channel.socket.local_port
        self.relay = channel.socket.relay
        self.origin = origin
        self.retired_at: float | None = None
        self._memory = memory
        self._promised: set[YamuxStream] = set()
        self._housekeeping = housekeeping
        self._used = False
        self._used_at = self.opened_at

    @property
    def address(self) -> Address | None:
        """Where it came from or goes to; None for one that a relay carries."""
        return parse_binary_address(self.remote_address) if self.remote_address else None

    @property
    def in_use(self) -> bool:
        """Whether a stream is open that is more than housekeeping, or is about to be."""
        return any(self._is_use(stream) for stream in self._streams.values())

    @property
    def used(self) -> bool:
        """Whether there ever was such a stream that has ended, knocks at relays not counted."""
        return self._used

    @property
    def used_at(self) -> float:
        """When the last stream that was more than housekeeping ended; before the first, when it was opened."""
        return self._used_at

    @property
    def leaving(self) -> bool:
        """Whether this side is closing it.

        Not if the peer has asked for no more streams: it may stay for ever.
        """
        return self.retired_at is not None or self.ending

    @property
    def usable(self) -> bool:
        return self.retired_at is None and super().usable

    def retire(self) -> None:
        """Ask the peer to open no more streams; those that are open go on."""
        if self.retired_at is None:
            self.retired_at = trio.current_time()
            self.send_frame(GO_AWAY, 0, 0, NORMAL_TERMINATION)

    def forget(self, stream: YamuxStream) -> None:
        if self._is_use(stream):
            self._used = self._used or stream.protocol not in _RELAYING
            self._used_at = trio.current_time()
        known = self._streams.get(stream.stream_id) is stream
        super().forget(stream)
        if known and stream not in self._promised:
            self._memory.release(self.remote, stream.window_growth)

    def reserve_window(self, growth: int) -> bool:
        """Take ``growth`` bytes from the connection's budget and from the host's."""
        if not self._memory.reserve(self.remote, growth):
            return False
        if super().reserve_window(growth):
            return True
        self._memory.release(self.remote, growth)
        return False

    def promise_window(self, stream: YamuxStream) -> bool:
        """Reserve memory for an inbound stream, until :meth:`withdraw_window`; False if there is none."""
        if not self._memory.reserve(self.remote, INITIAL_WINDOW):
            return False
        self._promised.add(stream)
        return True

    def withdraw_window(self, stream: YamuxStream) -> None:
        """Give the memory back: what arrives for ``stream`` from now on is not kept.

        A peer's reset does not do that, since what came before can still be read.
        """
        self._promised.discard(stream)
        over = self._streams.get(stream.stream_id) is not stream
        self._memory.release(self.remote, INITIAL_WINDOW + (stream.window_growth if over else 0))

    def _is_use(self, stream: YamuxStream) -> bool:
        if not stream.protocol:
            return stream.outbound  # what a peer only announces costs it nothing
        return stream.protocol not in self._housekeeping
