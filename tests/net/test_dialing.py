"""Dialling: every address is tried, and a failure says which hop it reached."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from raw_sockets import take

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import PeerUnreachable, StreamReset
from kwaainet_bridge.net import Host, HostConfig, multistream, open_host
from kwaainet_bridge.net.addresses import Vicinity, parse_address
from kwaainet_bridge.net.channel import secure_inbound
from kwaainet_bridge.net.identify import PeerDescription
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.library import noise_transport
from kwaainet_bridge.wire.peer_id import PeerId

NOBODY = Identity.generate("ed25519").peer_id


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


async def pretend(nursery: trio.Nursery, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> int:
    """Listen and treat each connection with ``serve``; return the port."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    return listener.socket.getsockname()[1]


async def failure(client: Host, peer: PeerId, address: str) -> PeerUnreachable:
    with pytest.raises(PeerUnreachable) as caught:
        await client.connect(f"{address}/p2p/{peer}")
    assert address in str(caught.value)
    return caught.value


class Resolver(trio.abc.HostnameResolver):
    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    async def getaddrinfo(self, host, port, *_):
        name = host.decode()  # trio hands over the encoded name
        if name not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (self.known[name], port))]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def test_dns_names(server: Host, client: Host) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver({"node.example": "127.0.0.1"}))
    port = server.addresses()[0].split("/")[4]
    assert await client.connect(f"/dns4/node.example/tcp/{port}/p2p/{server.peer_id}") == server.peer_id


async def test_localhost_by_name(server: Host, client: Host) -> None:
    port = server.addresses()[0].split("/")[4]
    assert await client.connect(f"/dns/localhost/tcp/{port}/p2p/{server.peer_id}") == server.peer_id


async def test_hop_dns(client: Host) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver({}))
    error = await failure(client, NOBODY, "/dns4/no.such.example/tcp/4001")
    assert error.hop == "dns"
    assert "not known" in str(error)


async def test_hop_tcp(client: Host) -> None:
    error = await failure(client, NOBODY, f"/ip4/127.0.0.1/tcp/{closed_port()}")
    assert error.hop == "tcp"
    assert "refused" in str(error)


async def test_hop_noise_another_peer(server: Host, client: Host) -> None:
    error = await failure(client, NOBODY, server.addresses()[0].partition("/p2p/")[0])
    assert error.hop == "noise"
    assert "another peer" in str(error)


async def test_hop_noise_not_libp2p(client: Host) -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        port = await pretend(nursery, http)
        error = await failure(client, NOBODY, f"/ip4/127.0.0.1/tcp/{port}")
        assert error.hop == "noise"
        nursery.cancel_scope.cancel()


async def test_hop_noise_refused_and_nothing_else_is_proposed(client: Host) -> None:
    """D3: a listener that declines noise gets no weaker proposal."""
    received = b""

    async def decline(stream: trio.SocketStream) -> None:
        nonlocal received
        await stream.send_all(b"\x13/multistream/1.0.0\n\x03na\n")
        async for data in stream:
            received += data

    async with trio.open_nursery() as nursery:
        port = await pretend(nursery, decline)
        error = await failure(client, NOBODY, f"/ip4/127.0.0.1/tcp/{port}")
        assert error.hop == "noise"
        assert received == b"\x13/multistream/1.0.0\n\x07/noise\n"
        nursery.cancel_scope.cancel()


async def test_hop_yamux(client: Host) -> None:
    identity = Identity.generate("ed25519")

    async def no_muxer(stream: trio.SocketStream) -> None:
        channel = await secure_inbound(take(stream, initiator=False), noise_transport(identity))
        with contextlib.suppress(StreamReset):
            await multistream.answer(channel, lambda _: None)

    async with trio.open_nursery() as nursery:
        port = await pretend(nursery, no_muxer)
        error = await failure(client, identity.peer_id, f"/ip4/127.0.0.1/tcp/{port}")
        assert error.hop == "yamux"
        assert "does not speak yamux" in str(error)
        nursery.cancel_scope.cancel()


async def test_hop_address(client: Host) -> None:
    with pytest.raises(PeerUnreachable, match="no address is known") as caught:
        await client.open_stream(NOBODY, "Echo.run")
    assert caught.value.hop == "address"


async def test_silence_times_out(client: Host, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "DIAL_SECONDS", 0.05)

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        port = await pretend(nursery, silent)
        error = await failure(client, NOBODY, f"/ip4/127.0.0.1/tcp/{port}")
        assert error.hop == "noise"
        assert "no answer within 0.05 s" in str(error)
        nursery.cancel_scope.cancel()


# --- D6


async def test_every_address_is_tried(server: Host, client: Host) -> None:
    dead = [f"/ip4/127.0.0.1/tcp/{closed_port()}" for _ in range(5)]
    client.add_addresses(server.peer_id, [*dead, server.addresses()[0]])
    stream = await client.open_stream(server.peer_id, "Echo.run")
    assert stream.remote == server.peer_id


async def test_each_failure_is_told(client: Host) -> None:
    ports = [closed_port() for _ in range(3)]
    client.add_addresses(NOBODY, [f"/ip4/127.0.0.1/tcp/{port}" for port in ports])
    with pytest.raises(PeerUnreachable) as caught:
        await client.open_stream(NOBODY, "Echo.run")
    for port in ports:
        assert f"/tcp/{port}: tcp: " in str(caught.value)


async def test_one_that_hangs_does_not_hold_up_the_others(server: Host, client: Host) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        port = await pretend(nursery, silent)
        client.add_addresses(server.peer_id, [f"/ip4/127.0.0.1/tcp/{port}", server.addresses()[0]])
        with trio.fail_after(defaults.DIAL_STAGGER_SECONDS + 2):
            await client.open_stream(server.peer_id, "Echo.run")
        nursery.cancel_scope.cancel()


async def test_a_peer_that_was_down_is_not_blacklisted(client: Host) -> None:
    identity = Identity.generate("ed25519")
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    await failure(client, identity.peer_id, address)
    async with open_host(HostConfig(identity, listen=[address])):
        await client.connect(f"{address}/p2p/{identity.peer_id}")
    await client.wait_disconnected(identity.peer_id)
    async with open_host(HostConfig(identity, listen=[address])):
        await client.connect(f"{address}/p2p/{identity.peer_id}")


async def test_a_success_does_not_wait_for_the_stagger(server: Host, client: Host, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "DIAL_STAGGER_SECONDS", 60)
    with trio.fail_after(5):
        await client.connect(server.addresses()[0])


async def test_a_caller_who_leaves_takes_nothing_from_the_others(server: Host, client: Host) -> None:
    client.add_addresses(server.peer_id, server.addresses())
    with trio.move_on_after(0) as gone:
        await client.open_stream(server.peer_id, "Echo.run")
    assert gone.cancelled_caught
    await client.open_stream(server.peer_id, "Echo.run")
    assert client.connections.count == 1


# --- addresses that fail, and those of somebody else


async def test_an_address_that_failed_is_left_alone_for_a_while(server: Host, client: Host) -> None:
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    client.add_addresses(NOBODY, [address])
    with pytest.raises(PeerUnreachable, match="refused"):
        await client.open_stream(NOBODY, "Echo.run")
    with pytest.raises(PeerUnreachable, match=r"refused; tried again in \d s") as caught:
        await client.open_stream(NOBODY, "Echo.run")
    assert caught.value.hop == "tcp"
    [result] = client.dial_results(NOBODY)
    assert (str(result.address), result.hop, result.failures) == (address, "tcp", 1)
    assert [hop for hop, _ in result.times] == ["tcp"]


async def test_whoever_asks_for_an_address_gets_it_tried(client: Host) -> None:
    identity = Identity.generate("ed25519")
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    client.add_addresses(identity.peer_id, [address])
    with pytest.raises(PeerUnreachable):
        await client.open_stream(identity.peer_id, "Echo.run")
    async with open_host(HostConfig(identity, listen=[address])):
        await client.connect(f"{address}/p2p/{identity.peer_id}")
        [result] = client.dial_results(identity.peer_id)
        assert (result.error, result.failures) == ("", 0)
        assert [hop for hop, _ in result.times] == ["tcp", "noise", "yamux"]
        assert all(seconds > 0 for _, seconds in result.times)


async def test_the_time_of_a_lookup_is_told(autojump_clock: trio.testing.MockClock, client: Host) -> None:
    class Slow(Resolver):
        async def getaddrinfo(self, host, port, *_):
            await trio.sleep(3)
            return await super().getaddrinfo(host, port)

    trio.socket.set_custom_hostname_resolver(Slow({}))
    assert (await failure(client, NOBODY, "/dns4/no.such.example/tcp/4001")).hop == "dns"
    [result] = client.dial_results(NOBODY)
    assert result.times == (("dns", pytest.approx(3)),)


async def test_an_address_of_another_peer_is_forgotten(server: Host, client: Host) -> None:
    address = server.addresses()[0].partition("/p2p/")[0]
    client.add_addresses(NOBODY, [address])
    with pytest.raises(PeerUnreachable, match=f"another peer answers at this address: {server.peer_id}"):
        await client.open_stream(NOBODY, "Echo.run")
    assert client.known_addresses(NOBODY) == []
    await client.connect(server.addresses()[0])  # and is kept where it belongs
    assert client.known_addresses(server.peer_id) == server.addresses()


async def test_own_address_under_another_name(server: Host) -> None:
    address = server.addresses()[0].partition("/p2p/")[0]
    server.add_addresses(NOBODY, [address])
    with pytest.raises(PeerUnreachable, match="this host itself answers at this address") as caught:
        await server.open_stream(NOBODY, "Echo.run")
    assert caught.value.hop == "noise"
    assert server.known_addresses(NOBODY) == []
    with trio.fail_after(5):
        while server.connections.count:
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert server.connected_peers() == []


async def test_private_addresses_of_another_network_are_told_and_not_dialled(
    server: Host, client: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a peer at a public address says of its private ones."""
    client._vicinity = Vicinity(["10.1.2.3"])
    said = [
        parse_address(f"/ip4/{host}/tcp/1") for host in ("8.8.8.8", "10.9.9.9", "192.168.1.1", "127.0.0.1")
    ]
    await client.connect(server.addresses()[0])
    await client.wait_identified()
    [connection] = client.connections
    monkeypatch.setattr(connection, "remote_host", "203.0.114.7")
    client._described(connection, PeerDescription("", frozenset(), tuple(said)))
    assert set(said) <= set(client.where(server.peer_id))
    dialled = {a.split("/")[2] for a in client.known_addresses(server.peer_id) if "/tcp/1/" in a}
    assert dialled == {"8.8.8.8", "10.9.9.9"}
    assert client.dialable(said, server.peer_id) == said[:2]
    assert client.dialable(said, NOBODY) == said[:2]


async def test_ipv6(client: Host) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    config = HostConfig(Identity.generate("ed25519"), listen=["/ip6/::1/tcp/0"])
    async with open_host(config) as host:
        assert await client.connect(host.addresses()[0]) == host.peer_id


async def test_lookups_that_nobody_waits_for_hold_few_threads(client: Host, monkeypatch) -> None:
    """A name server that is slow on purpose does not stop whoever else needs a thread."""
    go_on, asked = threading.Event(), list[str]()

    def slow(host, *rest):
        if not rest[-1] & socket.AI_NUMERICHOST:
            asked.append(host)
            go_on.wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(defaults, "DIAL_SECONDS", 0.02)
    try:
        for number in range(6):
            peer = PeerId(b"\x12\x20" + bytes([number]) * 32)
            client.add_addresses(
                peer, [f"/dns4/n{i}.example/tcp/1" for i in range(defaults.RESOLVER_THREADS)]
            )
            with pytest.raises(PeerUnreachable, match="no answer within"):
                await client.open_stream(peer, "Echo.run")
        assert len(asked) <= defaults.RESOLVER_THREADS
        with trio.fail_after(5):
            await trio.to_thread.run_sync(lambda: None)
    finally:
        go_on.set()
