"""Listening sockets: bound before the host says that it runs."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net.addresses import Address

log = logging.getLogger(__name__)

_BACKLOG = 256


class FamilyUnavailable(ConfigError):
    """This machine has no IPv6, or no IPv4, to listen on."""


async def bind(address: Address) -> tuple[trio.SocketListener, Address]:
    """Open a listening socket; return it and ``address`` with the port it got.

    Raises ConfigError, which names the address and the remedy, if the port is taken or the address is not
    this machine's; FamilyUnavailable for the wildcard address of a family that the machine lacks.
    """
    try:
        listener = trio.socket.socket(address.family, socket.SOCK_STREAM)
    except OSError as e:
        raise FamilyUnavailable(f"cannot listen on {address}: {e.strerror or e}") from e
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.protocol == "ip6":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await listener.bind((address.host, address.port))
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRNOTAVAIL and address.host in ("::", "0.0.0.0"):  # noqa: S104 - compared only
            raise FamilyUnavailable(f"cannot listen on {address}: {e.strerror}") from e
        raise ConfigError(f"cannot listen on {address}: {_explain(e)}") from e
    return trio.SocketListener(listener), Address(address.protocol, address.host, listener.getsockname()[1])


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
