"""What peers say of themselves and of this host: identify messages read and written."""

from __future__ import annotations

import pytest
from multiaddr import Multiaddr

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.net.addresses import Address, parse_address
from kwaainet_bridge.net.identify import decode_identify, encode_identify
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.peer_id import PeerId

HERE = Address("ip4", "192.0.2.7", 4001)
PEER = PeerId(b"\x12\x20" + bytes(32))


def identify(observed: bytes) -> bytes:
    [body] = DelimitedDecoder(1 << 16).feed(encode_identify(b"key", [HERE], ["Echo.run"], observed))
    return body


@pytest.mark.parametrize("text", ["/ip4/203.0.113.9/tcp/4001", "/ip6/2001:db8::7/tcp/31330"])
def test_where_the_peer_sees_this_host(text: str) -> None:
    described = decode_identify(identify(Multiaddr(text).to_bytes()))
    assert described.observed == parse_address(text)
    assert described.addresses == (HERE,)
    assert described.protocols == {"Echo.run"}


def test_golden_observed_address() -> None:
    """Field 4 of the message holds the binary multiaddr."""
    assert decode_identify(bytes.fromhex("22 08 04 cb007109 06 0fa1")).observed == Address(
        "ip4", "203.0.113.9", 4001
    )


@pytest.mark.parametrize(
    "observed",
    [
        b"",
        b"\xff\xff",
        bytes(2000),
        *(
            Multiaddr(text).to_bytes()
            for text in (
                "/ip4/203.0.113.9/tcp/0",
                "/dns4/a.example/tcp/4001",
                "/ip4/203.0.113.9/udp/4001/quic-v1",
                f"/ip4/203.0.113.9/tcp/4001/p2p/{PEER}/p2p-circuit",
                f"/p2p/{PEER}/p2p-circuit",
            )
        ),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_an_observed_address_that_says_nothing(observed: bytes) -> None:
    described = decode_identify(identify(observed))
    assert described.observed is None
    assert described.addresses == (HERE,)


def test_malformed() -> None:
    with pytest.raises(RemoteError, match="identify"):
        decode_identify(b"\x22\xff")


async def test_hosts_tell_each_other_where_they_see_them(client: Libp2pHost, server: Libp2pHost) -> None:
    await client.connect(server.addresses()[0])
    await client.wait_identified()
    [ours] = client.connections
    described = client.description(server.peer_id)
    assert described is not None
    assert described.observed == parse_address(
        "/ip4/{}/tcp/{}".format(*ours._channel.socket._socket.getsockname()[:2])
    )


async def test_what_is_seen_on_one_connection_is_not_taken_for_the_other(
    client: Libp2pHost, server: Libp2pHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts that have dialled each other see each other at two ports, and only one of these takes connections."""
    seen: list[tuple[int, int]] = []
    for host in (client, server):
        monkeypatch.setattr(
            host.own, "seen", lambda _, address, *, local_port: seen.append((address.port, local_port))
        )
    await client.connect(server.addresses()[0])
    await server._dialer.dial(client.peer_id, client.own.direct)
    for host in (client, server):
        await host.wait_identified()
    assert all(outside == local for outside, local in seen)  # nothing is between them
    assert len(set(seen)) == len(seen) == 4
