"""Limits and admission of a host that change while it runs."""

from __future__ import annotations

import pytest
import trio

from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.net import HostConfig, Libp2pHost, Stream, open_host
from kwaainet_bridge.net.admission import Admission, PeerDenied
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.limits import Limits

ECHO = "/echo/1"


async def echo(stream: Stream) -> None:
    await stream.write(await stream.read(1))


async def works(host: Libp2pHost, peer: object) -> bool:
    """Whether one more stream is served."""
    try:
        stream = await host.open_stream(peer, ECHO)  # type: ignore[arg-type]
        await stream.write(b"x")
        return bool(await stream.read(1) == b"x")
    except NetworkError:
        return False


async def test_fewer_streams_are_served_and_more_again() -> None:
    async with (
        open_host(HostConfig(Identity.generate("ed25519"))) as server,
        open_host(HostConfig(Identity.generate("ed25519"), listen=())) as client,
    ):
        server.serve(ECHO, echo)
        peer = await client.connect(server.addresses()[0])
        assert await works(client, peer)
        server.set_limits(Limits(streams=1, streams_per_peer=1))
        assert server.inbound.limit == 1
        kept = await client.open_stream(peer, ECHO)
        await kept.write(b"")
        assert not await works(client, peer)
        server.set_limits(Limits())
        assert await works(client, peer)
        assert server.refused.counts["streams"] >= 1


async def test_connections_that_are_open_stay_and_new_ones_are_refused() -> None:
    async with (
        open_host(HostConfig(Identity.generate("ed25519"))) as server,
        open_host(HostConfig(Identity.generate("ed25519"), listen=())) as first,
        open_host(HostConfig(Identity.generate("ed25519"), listen=())) as second,
    ):
        server.serve(ECHO, echo)
        peer = await first.connect(server.addresses()[0])
        held = await first.open_stream(peer, ECHO)
        server.set_limits(Limits(connections=1))
        assert server.connections.limit == 1
        await second.connect(server.addresses()[0])
        with trio.fail_after(10):
            await second.wait_disconnected(peer)
        await held.write(b"x")
        assert await held.read(1) == b"x"


async def test_whom_a_host_keeps_out_it_does_not_dial_either() -> None:
    async with (
        open_host(HostConfig(Identity.generate("ed25519"))) as one,
        open_host(HostConfig(Identity.generate("ed25519"))) as other,
    ):
        one.admit(Admission(deny={other.peer_id}))
        with pytest.raises(PeerDenied, match=r"kept out by peers\.deny: remove it there"):
            await one.connect(other.addresses()[0])
        one.admit(Admission(allow={one.peer_id}))
        with pytest.raises(PeerDenied, match=r"kept out by peers\.allow: add it there"):
            await one.connect(other.addresses()[0])
        one.admit(Admission(allow={other.peer_id}))
        peer = await one.connect(other.addresses()[0])
        one.admit(Admission(allow={other.peer_id}, deny={other.peer_id}))
        with trio.fail_after(10):
            await one.wait_disconnected(peer)
            await other.wait_disconnected(one.peer_id)
