"""TCP sockets of a host: the ones it listens on, and the ones that it dials from the same ports.

A router that translates addresses gives every local port a public one. Dials of public addresses therefore leave
from the port that the host listens on: what peers then see is where the router would take connections for it, which
is what has to be known to be dialled through the router, or at the same time as another dials (hole punching).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net.addresses import Address, private_block
from kwaainet_bridge.net.channel import TcpSocket

log = logging.getLogger(__name__)

_BACKLOG = 256
_CAN_SHARE_PORTS: Final = hasattr(socket, "SO_REUSEPORT")
_TAKEN: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)


class FamilyUnavailable(ConfigError):
    """This machine has no IPv6, or no IPv4, to listen on."""


async def bind(address: Address) -> tuple[trio.SocketListener, Address]:
    """Open a listening socket; return it and ``address`` with the port it got.

    Raises ConfigError, which names the address and the remedy, if the port is taken or the address is not
    this machine's; FamilyUnavailable for the wildcard address of a family that the machine lacks.
    """
    listener = await _bound(address, share=False)
    bound = Address(address.protocol, address.host, listener.getsockname()[1])
    if _CAN_SHARE_PORTS:
        # Only now shared, with the sockets that dial: otherwise two nodes could listen on one port and not know it.
        listener.close()
        listener = await _bound(bound, share=True)
    try:
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        raise ConfigError(f"cannot listen on {bound}: {_explain(e)}") from e
    return trio.SocketListener(listener), bound


async def _bound(address: Address, *, share: bool) -> trio.socket.SocketType:
    try:
        listener = trio.socket.socket(address.family, socket.SOCK_STREAM)
    except OSError as e:
        raise FamilyUnavailable(f"cannot listen on {address}: {e.strerror or e}") from e
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.protocol == "ip6":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await listener.bind((address.host, address.port))
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRNOTAVAIL and address.host in ("::", "0.0.0.0"):  # noqa: S104 - compared only
            raise FamilyUnavailable(f"cannot listen on {address}: {e.strerror}") from e
        raise ConfigError(f"cannot listen on {address}: {_explain(e)}") from e
    return listener


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop the program that holds it, or choose another (0 picks a free one)"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; listen on one of its own, or on 0.0.0.0"
    if error.errno == errno.EACCES:
        return "not permitted; ports below 1024 need privileges, choose a higher one"
    return error.strerror or str(error)


async def accept(
    listeners: Sequence[trio.SocketListener],
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    nursery: trio.Nursery,
    until: trio.CancelScope,
) -> None:
    """Start ``serve`` in ``nursery`` for each connection to any of them, until ``until`` is cancelled.

    ``serve`` owns the stream until it returns, and must not raise.
    """
    with until:
        await trio.serve_listeners(serve, list(listeners), handler_nursery=nursery)


class Connector:
    """Dials TCP; public addresses from the ports in ``listening``, where the system can share them."""

    def __init__(self, listening: Sequence[Address] = ()) -> None:
        self._listening = tuple(listening) if _CAN_SHARE_PORTS else ()

    async def connect(
        self, family: int, target: tuple[str | int, ...], *, from_any_port: bool = False
    ) -> TcpSocket:
        """Connect to a socket address. Raises OSError. Cancelled: no socket stays open.

        ``from_any_port``: even if the address is public.
        """
        local = None
        if not from_any_port and private_block(str(target[0])) is None:
            local = self._listening_towards(family, target)
        if local is not None:
            try:
                return await self._connect(family, target, local)
            except OSError as e:
                # an earlier connection between the two ports has not been forgotten yet
                if e.errno not in _TAKEN:
                    raise
                log.debug("dialling %s from another port: %s", target, e)
        return await self._connect(family, target, None)

    def _listening_towards(self, family: int, target: tuple[str | int, ...]) -> tuple[str, int] | None:
        """The listening socket's address that a dial of ``target`` may leave from.

        One that listens on a single address lends its port to what the system sends from that address anyway: from
        loopback or another network's interface nothing would get there.
        """
        same_family = [own for own in self._listening if own.family == family]
        for own in same_family:
            if ipaddress.ip_address(own.host).is_unspecified:
                return own.host, own.port
        if not same_family:
            return None
        with socket.socket(family, socket.SOCK_DGRAM) as route:  # sends nothing: it only asks for the route
            route.connect(target)
            source = route.getsockname()[0]
        return next(((own.host, own.port) for own in same_family if own.host == source), None)

    @staticmethod
    async def _connect(
        family: int, target: tuple[str | int, ...], local: tuple[str, int] | None
    ) -> TcpSocket:
        connection = trio.socket.socket(family, trio.socket.SOCK_STREAM)
        try:
            if local is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                await connection.bind(local)
            await connection.connect(target)
            return TcpSocket(trio.SocketStream(connection), initiator=True)
        except BaseException:
            connection.close()
            raise
