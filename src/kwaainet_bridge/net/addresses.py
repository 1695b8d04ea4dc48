"""Multiaddrs: what can be dialled or listened on, and what a listening host can be reached at."""

from __future__ import annotations

import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from kwaainet_bridge.defaults import MAX_ADDRESSES_PER_PEER, MAX_KNOWN_PEERS
from kwaainet_bridge.errors import ConfigError, RemoteError
from kwaainet_bridge.wire.peer_id import PeerId

_FAMILIES: Final = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
_MAX_ADDRESS_CHARACTERS: Final = 512
_MULTIADDR_ERRORS: Final = (
    ValueError,
    TypeError,
    LookupError,
)  # its own are ValueErrors; its varints raise others


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP multiaddr: ``/<ip4|ip6|dns|dns4|dns6>/<host>/tcp/<port>``, with or without ``/p2p/<peer>``.

    With ``relay`` that is where this relay listens, and the peer is reached through it:
    ``/ip4/<host>/tcp/<port>/p2p/<relay>/p2p-circuit``.
    """

    protocol: str
    host: str
    port: int
    peer: PeerId | None = None
    relay: PeerId | None = None

    @property
    def family(self) -> socket.AddressFamily:
        """Which addresses a name may resolve to."""
        return _FAMILIES[self.protocol]

    @property
    def transport(self) -> str:
        """The address without the ``/p2p/…`` of the peer."""
        direct = f"/{self.protocol}/{self.host}/tcp/{self.port}"
        return direct if self.relay is None else f"{direct}/p2p/{self.relay}/p2p-circuit"

    @property
    def binary(self) -> bytes:
        """:attr:`transport` in the binary form that peers exchange."""
        return bytes(Multiaddr(self.transport).to_bytes())

    def binary_of(self, peer: PeerId) -> bytes:
        """The address of ``peer`` in full, in the binary form."""
        return bytes(Multiaddr(str(replace(self, peer=peer))).to_bytes())

    @property
    def is_name(self) -> bool:
        """Whether the host is a name, to be resolved."""
        return self.protocol.startswith("dns")

    def without_peer(self) -> Address:
        """The same address without the ``/p2p/…`` of the peer."""
        return replace(self, peer=None)

    def of_relay(self) -> Address:
        """Where the relay of a relayed address listens."""
        return Address(self.protocol, self.host, self.port, self.relay)

    def through(self, relay: PeerId) -> Address:
        """The address of whoever is reached through ``relay``, which listens at this one."""
        return Address(self.protocol, self.host, self.port, relay=relay)

    def __str__(self) -> str:
        return self.transport if self.peer is None else f"{self.transport}/p2p/{self.peer}"


def parse_address(text: str) -> Address | None:
    """Read a multiaddr. None if it is valid but neither TCP nor a circuit over TCP (QUIC, WebSocket, dnsaddr).

    Raises RemoteError if it is malformed.
    """
    if len(text) > _MAX_ADDRESS_CHARACTERS:
        raise RemoteError(f"address of {len(text)} characters is too long")
    try:
        return _from_parts([(p.name, value) for p, value in Multiaddr(text).items()])
    except _MULTIADDR_ERRORS as e:
        raise RemoteError(f"address {text!r:.200} is malformed: {e!s:.200}") from e


def parse_binary_address(data: bytes) -> Address | None:
    """Read the binary form, as identify and Kademlia carry it. None for anything but a well-formed TCP
    address.

    Peers announce whatever they listen on, so an address that cannot be used is no error of theirs.
    """
    if len(data) > _MAX_ADDRESS_CHARACTERS:
        return None
    try:
        return parse_address(str(Multiaddr(data)))
    except (RemoteError, *_MULTIADDR_ERRORS):
        return None


def _from_parts(parts: list[tuple[str, str | None]]) -> Address | None:
    names = [name for name, _ in parts]
    if len(names) < 2 or names[0] not in _FAMILIES or names[1] != "tcp":
        return None
    ids = [PeerId.parse(value or "") for name, value in parts if name == "p2p"]
    match names[2:]:
        case []:
            peer = relay = None
        case ["p2p"]:
            [peer], relay = ids, None
        case ["p2p", "p2p-circuit"]:
            peer, [relay] = None, ids
        case ["p2p", "p2p-circuit", "p2p"]:
            relay, peer = ids
        case _:
            return None
    return Address(names[0], parts[0][1] or "", int(parts[1][1] or 0), peer, relay)


def split_peer_address(text: str) -> tuple[PeerId, Address]:
    """Read a full address, ``…/tcp/<port>/p2p/<peer>``. RemoteError if a part is missing or malformed."""
    address = parse_address(text)
    if address is None or address.peer is None:
        raise RemoteError(
            f"address {text!r} cannot be dialled: "
            "expected /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>/p2p/<peer id>, or "
            "/…/tcp/<port>/p2p/<relay>/p2p-circuit/p2p/<peer id>"
        )
    return address.peer, address


def parse_listen_address(text: str) -> Address:
    """Read an address to listen on. ConfigError, which names it, if that is not
    ``/ip4|ip6/<host>/tcp/<port>``."""
    try:
        address = parse_address(text)
    except RemoteError as e:
        raise ConfigError(f"listen address {text!r}: {e}") from e
    if address is None or address.protocol not in ("ip4", "ip6") or address.peer or address.relay:
        raise ConfigError(
            f"listen address {text!r}: expected /ip4/<address>/tcp/<port> or /ip6/<address>/tcp/<port>"
        )
    return address


def parse_announce_address(text: str) -> Address:
    """Read an address to announce, which may end in ``/p2p/…``. ConfigError, which names it, for anything else."""
    try:
        address = parse_address(text)
    except RemoteError as e:
        raise ConfigError(f"announced address {text!r}: {e}") from e
    if address is None or not address.port or address.relay is not None:
        raise ConfigError(f"announced address {text!r}: expected /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>")
    return address.without_peer()


def reachable_forms(listening: Iterable[Address]) -> list[Address]:
    """Replace 0.0.0.0 and :: by the addresses of this machine's interfaces, loopback last; drop
    duplicates."""
    found: list[Address] = []
    for address in listening:
        if ipaddress.ip_address(address.host).is_unspecified:
            v4 = address.protocol == "ip4"
            hosts = [*get_network_addrs(4 if v4 else 6), "127.0.0.1" if v4 else "::1"]
            found += [Address(address.protocol, host, address.port) for host in hosts]
        else:
            found.append(address)
    return list(dict.fromkeys(found))


Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PRIVATE: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "127.0.0.0/8",
            "0.0.0.0/8",  # a dial of it ends at this machine itself
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",
            "169.254.0.0/16",
            "::1/128",
            "::/128",  # likewise
            "fe80::/10",
        ),
    )
)
_UNIQUE_LOCAL: Final = ipaddress.ip_network("fc00::/7")
_UNIQUE_LOCAL_PREFIX: Final = 48
"""Of unique local addresses this much is drawn at random for each network (RFC 4193)."""


def private_block(host: str) -> Network | None:
    """The range of private, link-local or loopback addresses that ``host`` belongs to; None if it is public
    or a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address in _UNIQUE_LOCAL:
        return ipaddress.ip_network((address, _UNIQUE_LOCAL_PREFIX), strict=False)
    return next((block for block in _PRIVATE if address in block), None)


def public_first(addresses: Iterable[Address]) -> list[Address]:
    """Public addresses and names, then private ones, each in the order given."""
    return sorted(addresses, key=lambda address: private_block(address.host) is not None)


class Vicinity:
    """Which private networks this machine is part of, and so which private addresses of strangers may be
    dialled.

    Such an address means something else in each network. Elsewhere a dial of it ends at a machine that has
    nothing to do with the peer, perhaps one that a stranger wants us to knock at, or at nobody after
    ten seconds. So it is dialled only if this machine has an address in the same range, or if whoever told
    us is in it: a peer that we reach at 192.168.1.7 knows 192.168.1.8. Loopback addresses are dialled when told over
    loopback.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._blocks = {private_block(host) for host in hosts} - {None}

    @classmethod
    def here(cls) -> Vicinity:
        """That of this machine's interfaces as they are now; loopback and link-local ones do not count."""
        return cls([*get_network_addrs(4), *get_network_addrs(6)])

    def has(self, address: Address, *, told_by: str) -> bool:
        """Whether ``address``, heard from the peer at the IP address ``told_by``, may be dialled."""
        block = private_block(address.host)
        return block is None or block in self._blocks or block == private_block(told_by)


class AddressBook:
    """Where peers may be dialled, as far as this host was told. Bounded; forgets the peer heard of
    longest ago."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, dict[Address, bool]] = OrderedDict()

    def add(
        self, peer: PeerId, addresses: Iterable[Address], *, here: Callable[[Address], bool] = lambda _: True
    ) -> None:
        """Remember addresses; those told last are dialled first. ``here`` says which of them can be dialled
        from here; the others are told to others only."""
        known = self._peers.pop(peer, {})
        told = {a: here(a) or known.get(a, False) for a in (a.without_peer() for a in addresses) if a.port}
        merged = {**told, **{a: dialled for a, dialled in known.items() if a not in told}}
        self._peers[peer] = dict(list(merged.items())[:MAX_ADDRESSES_PER_PEER])
        if len(self._peers) > MAX_KNOWN_PEERS:
            self._peers.popitem(last=False)

    def get(self, peer: PeerId) -> list[Address]:
        """Return all addresses of ``peer``, the newest first."""
        return list(self._peers.get(peer, ()))

    def dialable(self, peer: PeerId) -> list[Address]:
        """Return those that can be dialled from here."""
        return [address for address, here in self._peers.get(peer, {}).items() if here]

    def remove(self, peer: PeerId, address: Address) -> None:
        """Forget one address, if it is known."""
        self._peers.get(peer, {}).pop(address.without_peer(), None)
