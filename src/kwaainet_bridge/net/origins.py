"""Where connections come from: how many each address has, so that one of them cannot take all places."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Final

_IPV6_NETWORK: Final = 64
"""What one IPv6 customer is given at least; within it addresses cost nothing."""

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def origin_of(host: str) -> str | None:
    """Who answers for connections from ``host``: its IPv4 address, or its IPv6 /64. None for addresses that
    are not public.

    Those are not limited: behind a port forwarder, a container's proxy or a tunnel all peers come from one
    private or loopback address, and on a local network the operator knows whom to switch off. The limits of
    the host hold for them too.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if not address.is_global:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, _IPV6_NETWORK), strict=False))
    return str(address)


class Origins:
    """Counts inbound connections and handshakes by origin; None counts for nobody."""

    def __init__(self, *, connections: int, handshakes: int) -> None:
        self.most_connections = connections
        self._max_handshakes = handshakes
        self._connections: Counter[str] = Counter()
        self._handshakes: Counter[str] = Counter()

    def begin(self, origin: str | None, *, free: int) -> bool:
        """Count a handshake; False if ``origin`` has too many of them, or of connections.

        With ``free`` places left on the host it gets no more than those, but one: so a few addresses that
        keep all their connections busy do not shut out the others.
        """
        if origin is None:
            return True
        handshakes = self._handshakes[origin]
        if handshakes >= self._max_handshakes or self._connections[origin] + handshakes >= min(
            self.most_connections, max(free, 1)
        ):
            return False
        self._handshakes[origin] += 1
        return True

    def end(self, origin: str | None) -> None:
        """Forget a handshake that is over."""
        _decrease(self._handshakes, origin)

    def connected(self, origin: str | None) -> None:
        """Count a connection."""
        if origin is not None:
            self._connections[origin] += 1

    def disconnected(self, origin: str | None) -> None:
        """Forget a connection that has ended."""
        _decrease(self._connections, origin)

    def __len__(self) -> int:
        """Origins remembered."""
        return len(self._connections.keys() | self._handshakes.keys())


def _decrease(counter: Counter[str], origin: str | None) -> None:
    if origin is None:
        return
    counter[origin] -= 1
    if not counter[origin]:
        del counter[origin]
