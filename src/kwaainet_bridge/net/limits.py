"""How much one host takes on, from everybody together and from each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kwaainet_bridge import defaults


@dataclass(frozen=True)
class Limits:
    """What a host holds at one time.

    ``connections`` is hard: beyond it an idle connection makes room, or the new one is refused. Above
    ``high`` idle connections are closed until ``low`` are left; both default to shares of ``connections`` and
    never exceed it. ``streams`` are those that peers open, counted until their handlers have ended;
    ``buffer_bytes`` is what peers may have on its way to streams that do not read. No peer gets more of
    either than is free.

    ``strangers`` is how many connections are kept whose peers show no sign of being in a network of this host; it
    defaults to a share of ``connections``. ``connections_per_network``: what a network has beyond that goes first of
    what is idle, after strangers.
    """

    connections: int = defaults.MAX_CONNECTIONS
    connections_high: int | None = None
    connections_low: int | None = None
    connections_per_address: int = defaults.MAX_CONNECTIONS_PER_ADDRESS
    strangers: int | None = None
    connections_per_network: Mapping[str, int] = field(default_factory=dict)
    streams: int = defaults.MAX_STREAMS
    streams_per_peer: int = defaults.MAX_STREAMS_PER_PEER
    buffer_bytes: int = defaults.STREAM_BUFFER_BYTES

    @property
    def high(self) -> int:
        """Connections above which idle ones are closed."""
        if self.connections_high is None:
            return int(self.connections * defaults.HIGH_CONNECTIONS_SHARE)
        return min(self.connections_high, self.connections)

    @property
    def low(self) -> int:
        """Connections that are left then."""
        if self.connections_low is None:
            return min(int(self.connections * defaults.LOW_CONNECTIONS_SHARE), self.high)
        return min(self.connections_low, self.high)

    @property
    def most_strangers(self) -> int:
        """Connections that are kept for strangers."""
        if self.strangers is None:
            return int(self.connections * defaults.STRANGERS_SHARE)
        return self.strangers
