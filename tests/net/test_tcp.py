"""Sockets: one port for listening and dialling, and for one host alone."""

from __future__ import annotations

import socket

import pytest
import trio

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.net import tcp
from kwaainet_bridge.net.addresses import parse_listen_address
from kwaainet_bridge.net.tcp import Connector, bind

ANY_PORT = parse_listen_address("/ip4/127.0.0.1/tcp/0")


async def accepted(listener: trio.SocketListener) -> trio.SocketStream:
    with trio.fail_after(5):
        return await listener.accept()


async def test_a_port_is_listened_on_once_though_it_is_shared_with_dials() -> None:
    listener, address = await bind(ANY_PORT)
    async with listener:
        with pytest.raises(ConfigError, match="the port is in use"):
            await bind(address)


async def test_public_addresses_are_dialled_from_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "private_block", lambda _: None)
    ours, own = await bind(ANY_PORT)
    theirs, target = await bind(ANY_PORT)
    async with ours, theirs:
        dialled = await Connector([own]).connect(socket.AF_INET, (target.host, target.port))
        async with await accepted(theirs) as stream:
            assert stream.socket.getpeername()[1] == dialled.local_port == own.port
            again = await Connector([own]).connect(socket.AF_INET, (target.host, target.port))
            assert again.local_port != own.port  # those two ports are connected already
            again.abort()
        dialled.abort()


async def test_private_addresses_are_dialled_from_any_port() -> None:
    ours, own = await bind(ANY_PORT)
    theirs, target = await bind(ANY_PORT)
    async with ours, theirs:
        dialled = await Connector([own]).connect(socket.AF_INET, (target.host, target.port))
        assert dialled.local_port != own.port
        dialled.abort()


async def test_a_refused_dial_is_not_repeated_from_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "private_block", lambda _: None)
    listener, closed = await bind(ANY_PORT)
    await listener.aclose()
    ours, own = await bind(ANY_PORT)
    async with ours:
        with pytest.raises(ConnectionRefusedError):
            await Connector([own]).connect(socket.AF_INET, (closed.host, closed.port))


async def test_a_port_is_shared_only_with_dials_that_leave_from_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the address of another interface, or from loopback, nothing would get there."""
    monkeypatch.setattr(tcp, "private_block", lambda _: None)
    theirs, target = await bind(ANY_PORT)
    elsewhere, own = await bind(parse_listen_address("/ip4/127.0.0.2/tcp/0"))
    async with theirs, elsewhere:
        dialled = await Connector([own]).connect(socket.AF_INET, (target.host, target.port))
        async with await accepted(theirs) as stream:
            host, port = stream.socket.getpeername()
            assert host == "127.0.0.1"
            assert port != own.port
        dialled.abort()
