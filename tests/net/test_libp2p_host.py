"""Two of our hosts on loopback sockets."""

from __future__ import annotations

import socket

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    ConfigError,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamReset,
)
from kwaainet_bridge.net import Host, HostConfig, Stream, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.wire.peer_id import PeerId


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def read_all(stream: Stream) -> bytes:
    parts = []
    while data := await stream.read(1 << 16):
        parts.append(data)
    return b"".join(parts)


async def read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.read(size - len(data))
        assert piece
        data += piece
    return data


async def test_connect_and_echo(server: Host, client: Host) -> None:
    assert await client.connect(server.addresses()[0]) == server.peer_id
    stream = await client.open_stream(server.peer_id, "Echo.run")
    assert (stream.remote, stream.protocol) == (server.peer_id, "Echo.run")
    await stream.write(b"hello")
    assert await stream.read(100) == b"hello"
    await stream.close()
    assert client.connected_peers() == [server.peer_id]
    assert server.connected_peers() == [client.peer_id]


@pytest.mark.parametrize("second", ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"])
async def test_every_listen_address_is_served(client: Host, second: str) -> None:
    if "ip6" in second and not has_ipv6_loopback():
        pytest.skip("this machine has no IPv6 loopback")
    listen = ("/ip4/127.0.0.1/tcp/0", second)
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=listen)) as host:
        assert len(host.addresses()) == 2
        for address in host.addresses():
            async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as caller:
                assert await caller.connect(address) == host.peer_id


async def test_default_listen_addresses_work_together(client: Host) -> None:
    """The wildcards of both families on one port, as a node's defaults have them."""
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=("/ip4/0.0.0.0/tcp/0",))) as probe:
        port = probe.addresses()[0].split("/")[4]
    listen = tuple(text.replace("31330", port) for text in defaults.LISTEN_ADDRESSES)
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=listen)) as host:
        local = next(a for a in host.addresses() if a.startswith("/ip4/127.0.0.1/"))
        assert await client.connect(local) == host.peer_id


async def test_four_megabytes_both_ways(server: Host, client: Host) -> None:
    await client.connect(server.addresses()[0])
    stream = await client.open_stream(server.peer_id, "Echo.run")
    payload = bytes(range(256)) * (4 << 12)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, payload)
        assert await read_exactly(stream, len(payload)) == payload


async def test_unknown_protocol(server: Host, client: Host) -> None:
    await client.connect(server.addresses()[0])
    with pytest.raises(ProtocolNotSupported, match="does not serve Nope"):
        await client.open_stream(server.peer_id, "Nope.rpc")


async def test_a_handler_that_raises_resets_its_stream_only(server: Host, client: Host, caplog) -> None:
    async def fail(stream: Stream) -> None:
        raise ZeroDivisionError("deliberate")

    server.serve("Fail.run", fail)
    await client.connect(server.addresses()[0])
    other = await client.open_stream(server.peer_id, "Echo.run")
    stream = await client.open_stream(server.peer_id, "Fail.run")
    with pytest.raises(StreamReset):
        await stream.read(1)
    await other.write(b"alive")
    assert await other.read(10) == b"alive"
    assert "handler of Fail.run failed" in caplog.text


async def test_one_connection_is_shared_by_concurrent_dials(server: Host, client: Host) -> None:
    client.add_addresses(server.peer_id, server.addresses())

    async def use() -> None:
        stream = await client.open_stream(server.peer_id, "Echo.run")
        await stream.write(b"x")
        assert await stream.read(1) == b"x"

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(use)
    assert client.connections.count == 1


async def test_served_once() -> None:
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:

        async def handler(stream: Stream) -> None: ...

        host.serve("A.b", handler)
        with pytest.raises(ValueError, match=r"A\.b"):
            host.serve("A.b", handler)
        host.unserve("A.b")
        host.serve("A.b", handler)


async def test_a_host_does_not_dial_itself(server: Host) -> None:
    with pytest.raises(PeerUnreachable, match="itself") as caught:
        await server.connect(server.addresses()[0])
    assert caught.value.hop == "address"


async def test_a_host_calls_what_it_serves_itself(server: Host) -> None:
    """Over memory, with the same errors as elsewhere."""

    async def echo(stream: Stream) -> None:
        await stream.write(await stream.read(100))

    async def fail(stream: Stream) -> None:
        raise RemoteError("not this one")

    server.serve("itself.echo", echo)
    server.serve("itself.fail", fail)
    stream = await server.open_stream(server.peer_id, "itself.echo")
    assert stream.remote == server.peer_id
    await stream.write(b"words")
    assert await stream.read(100) == b"words"
    assert await stream.read(100) == b""
    await stream.close()
    stream = await server.open_stream(server.peer_id, "itself.fail")
    with pytest.raises(StreamReset):
        await stream.read(100)
    with pytest.raises(ProtocolNotSupported, match=r"itself\.else"):
        await server.open_stream(server.peer_id, "itself.else")


async def test_malformed_addresses_are_named(client: Host) -> None:
    peer = PeerId(b"\x12\x20" + bytes(32))
    with pytest.raises(RemoteError, match=r"/ip4/1\.2\.3/tcp/1"):
        client.add_addresses(peer, ["/ip4/1.2.3/tcp/1"])
    with pytest.raises(RemoteError, match="cannot be dialled"):
        await client.connect("/ip4/1.2.3.4/tcp/1")


async def test_port_in_use(server: Host) -> None:
    address = server.addresses()[0].partition("/p2p/")[0]
    with pytest.raises(ConfigError, match=f"{address}.*port is in use.*another"):
        async with open_host(HostConfig(Identity.generate("ed25519"), listen=[address])):
            pass


@pytest.mark.parametrize("address", ["/ip4/127.0.0.1/udp/4001/quic-v1", "localhost:4001", "/dns4/a.b/tcp/1"])
async def test_listen_address_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        async with open_host(HostConfig(Identity.generate("ed25519"), listen=[address])):
            pass


async def test_wildcard_lists_interfaces_and_loopback() -> None:
    config = HostConfig(Identity.generate("ed25519"), listen=["/ip4/0.0.0.0/tcp/0"])
    async with open_host(config) as host:
        addresses = host.addresses()
        assert addresses[-1].startswith("/ip4/127.0.0.1/tcp/")
        assert not any("0.0.0.0" in a for a in addresses)
        assert all(a.endswith(f"/p2p/{host.peer_id}") for a in addresses)


async def test_announced_addresses_replace_those_listened_on() -> None:
    config = HostConfig(Identity.generate("ed25519"), announce=["/dns4/node.example/tcp/31330"])
    async with open_host(config) as host:
        assert host.addresses() == [f"/dns4/node.example/tcp/31330/p2p/{host.peer_id}"]


async def test_an_exception_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="deliberate"):
        async with open_host(HostConfig(Identity.generate("ed25519"))):
            raise KeyError("deliberate")
