"""Connections that tests make by hand, below the host; all are closed when the test ends (see conftest)."""

from __future__ import annotations

import trio

from kwaainet_bridge.net.channel import TcpSocket

_taken: list[TcpSocket] = []


def take(stream: trio.SocketStream, *, initiator: bool) -> TcpSocket:
    _taken.append(TcpSocket(stream, initiator=initiator))
    return _taken[-1]


def close_all() -> None:
    while _taken:
        _taken.pop()._socket.close()
