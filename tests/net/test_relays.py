"""Relays: live circuits between three of our hosts, and what is refused."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import PeerUnreachable, StreamReset
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.addresses import Address, parse_address
from kwaainet_bridge.net.circuit import RelayRefused, read_message
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.relay_service import RelayLimits
from kwaainet_bridge.net.relays import reserve
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.circuit import (
    HOP,
    STOP,
    CircuitLimit,
    HopMessage,
    HopType,
    Status,
    StopMessage,
    StopType,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)
from kwaainet_bridge.wire.peer_id import PeerId


@asynccontextmanager
async def host(**options: object) -> AsyncIterator[Libp2pHost]:
    async with open_host(HostConfig(Identity.generate("ed25519"), **options)) as opened:
        opened.serve("Echo.run", echo)
        yield opened


@asynccontextmanager
async def relay(**limits: object) -> AsyncIterator[Libp2pHost]:
    async with host(relay_limits=RelayLimits(**limits)) as opened:
        opened.traversal.offer(True)
        yield opened


async def until(condition) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.01)


async def hide(hidden: Libp2pHost, *relays: Libp2pHost) -> None:
    """Connect a host that does not listen to relays, and wait until it has its places."""
    for other in relays:
        await hidden.connect(other.addresses()[0])
    await hidden.wait_identified()
    hidden.traversal.keeper.want(True)
    await until(lambda: len(hidden.traversal.keeper.reservations) == len(relays))


async def exchange(caller: Libp2pHost, peer: PeerId, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    received = bytearray()
    async with trio.open_nursery() as nursery:
        stream = await caller.open_stream(peer, "Echo.run")
        nursery.start_soon(stream.write, payload)
        while len(received) < size:
            data = await stream.read(1 << 16)
            assert data
            received += data
    await stream.close()
    assert received == payload


async def send(caller: Libp2pHost, peer: PeerId, size: int) -> None:
    stream = await caller.open_stream(peer, "Echo.run")
    await stream.write(bytes(size))
    while size:
        size -= len(await stream.read(1 << 16))


# --- circuits


@pytest.mark.parametrize("size", [5, 4 << 20])
async def test_a_host_that_does_not_listen_is_called_through_a_relay(size: int) -> None:
    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        await hide(hidden, middle)
        [address] = hidden.addresses()
        assert address == f"{middle.addresses()[0]}/p2p-circuit/p2p/{hidden.peer_id}"
        assert await caller.connect(address) == hidden.peer_id
        await exchange(caller, hidden.peer_id, size)
        [outbound] = [c for c in caller.connections if c.remote == hidden.peer_id]
        [inbound] = [c for c in hidden.connections if c.remote == caller.peer_id]
        assert outbound.relay == inbound.relay == middle.peer_id
        assert middle.traversal.service.circuits == 1
        await exchange(hidden, caller.peer_id, size)  # the same connection, the other way
        await outbound.close()
        await until(lambda: middle.traversal.service.circuits == 0)


async def test_it_is_found_by_its_id_alone() -> None:
    """Who is connected to the relay asks it where the peer is, and is given the relayed address."""
    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        await hide(hidden, middle)
        await until(lambda: middle.known_addresses(hidden.peer_id))
        await caller.connect(middle.addresses()[0])
        await exchange(caller, hidden.peer_id, 5)


async def test_a_direct_connection_is_preferred() -> None:
    async with relay() as middle, host() as hidden, host() as caller:
        await hide(hidden, middle)
        direct, relayed = hidden.addresses()
        await caller.connect(relayed)
        [first] = [c for c in caller.connections if c.remote == hidden.peer_id]
        await caller._dialer.dial(hidden.peer_id, [parse_address(direct)])
        found = caller.connections.find(hidden.peer_id)
        assert found is not first
        assert found.relay is None
        await exchange(caller, hidden.peer_id, 5)


async def test_a_dial_through_a_relay_does_not_pass_for_a_direct_one() -> None:
    """Whoever wants a direct one, to have it relay for instance, may find the other under way."""
    async with relay() as middle, host() as hidden, host() as caller:
        await hide(hidden, middle)
        direct, relayed = hidden.addresses()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.connect, relayed)
            while not caller._dialer._attempts:
                await trio.lowlevel.checkpoint()
            found = await caller.direct_connection(hidden.peer_id, [parse_address(direct)])
        assert found.relay is None


async def test_what_a_circuit_carries_is_limited() -> None:
    limit = CircuitLimit(seconds=60, data_bytes=300_000)
    async with relay(circuit=limit) as middle, host(listen=()) as hidden, host() as caller:
        await hide(hidden, middle)
        [reservation] = hidden.traversal.keeper.reservations
        assert reservation.limit == limit
        await caller.connect(hidden.addresses()[0])
        await exchange(caller, hidden.peer_id, 100_000)
        with pytest.raises(StreamReset):
            await send(caller, hidden.peer_id, 400_000)
        await until(lambda: middle.traversal.service.circuits == 0)


async def test_a_relay_that_ends_takes_its_circuits_with_it() -> None:
    async with host(listen=()) as hidden, host() as caller:
        async with relay() as middle:
            await hide(hidden, middle)
            await caller.connect(hidden.addresses()[0])
            stream = await caller.open_stream(hidden.peer_id, "Echo.run")
            await stream.write(b"hello")
            assert await stream.read(10) == b"hello"
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.read(10)
        await until(lambda: hidden.addresses() == [])
        with pytest.raises(PeerUnreachable):
            await caller.open_stream(hidden.peer_id, "Echo.run")


async def test_of_a_relay_with_many_interfaces_the_public_address_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes last among its addresses if a router forwards it, and of so many not all are told."""
    public = Address("ip4", "8.8.8.8", 4001)
    own = [*(Address("ip4", f"10.0.{number}.1", 4001) for number in range(20)), public]
    async with relay() as middle, host(listen=()) as hidden:
        monkeypatch.setattr(middle.traversal, "direct_addresses", lambda: own)
        await hide(hidden, middle)
        assert hidden.own.told[0] == public.through(middle.peer_id)
        assert len(hidden.own.told) == defaults.MAX_RELAY_ADDRESSES


# --- what a relay refuses


async def ask(caller: Libp2pHost, middle: Libp2pHost, message: bytes) -> HopMessage:
    await caller.connect(middle.addresses()[0])
    stream = await caller.open_stream(middle.peer_id, HOP)
    await stream.write(message)
    try:
        return decode_hop(await read_message(stream))
    finally:
        await stream.close()


async def test_there_is_no_circuit_without_a_place() -> None:
    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        await hidden.connect(middle.addresses()[0])
        with pytest.raises(PeerUnreachable, match="NO_RESERVATION") as failed:
            await caller.connect(f"{middle.addresses()[0]}/p2p-circuit/p2p/{hidden.peer_id}")
        assert failed.value.hop == "relay"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (encode_hop(HopMessage(HopType.CONNECT)), Status.MALFORMED_MESSAGE),
        (encode_hop(HopMessage(HopType.STATUS, status=Status.OK)), Status.MALFORMED_MESSAGE),
        (encode_hop(HopMessage(7)), Status.MALFORMED_MESSAGE),
        (b"\x02\x00\xff", Status.MALFORMED_MESSAGE),
        (b"\x02\x12\x00", Status.MALFORMED_MESSAGE),
        (b"\xff\x7f", Status.MALFORMED_MESSAGE),
    ],
)
async def test_malformed_requests(message: bytes, status: Status) -> None:
    async with relay() as middle, host() as caller:
        answer = await ask(caller, middle, message)
        assert (answer.type, answer.status) == (HopType.STATUS, status)
        assert not middle.traversal.service.reservations


async def test_places_are_limited_and_renewal_needs_no_second_one() -> None:
    async with relay(reservations=1) as middle, host() as first, host() as second:
        await hide(first, middle)
        await reserve(first.traversal, middle.peer_id)
        await second.connect(middle.addresses()[0])
        with pytest.raises(RelayRefused, match="RESERVATION_REFUSED"):
            await reserve(second.traversal, middle.peer_id)
        first.traversal.keeper.want(False)
        await next(c for c in first.connections if c.remote == middle.peer_id).close()
        await until(lambda: not middle.traversal.service.reservations)
        await reserve(second.traversal, middle.peer_id)


async def test_peers_at_one_public_address_have_a_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relay(reservations_per_address=1) as middle, host() as first, host() as second:
        origins = {first.peer_id: "8.8.8.8", second.peer_id: "8.8.8.8"}
        monkeypatch.setattr(middle.traversal, "origin_of", lambda stream: origins[stream.remote])
        await hide(first, middle)
        await reserve(first.traversal, middle.peer_id)
        await second.connect(middle.addresses()[0])
        with pytest.raises(RelayRefused, match="RESERVATION_REFUSED"):
            await reserve(second.traversal, middle.peer_id)
        origins[second.peer_id] = None  # behind a port forwarder all are seen at one private address
        await reserve(second.traversal, middle.peer_id)


async def test_circuits_of_one_peer_are_limited() -> None:
    async with relay(circuits_per_peer=1) as middle, host(listen=()) as hidden, host() as one, host() as two:
        await hide(hidden, middle)
        await one.connect(hidden.addresses()[0])
        with pytest.raises(PeerUnreachable, match="RESOURCE_LIMIT_EXCEEDED"):
            await two.connect(hidden.addresses()[0])
        await exchange(one, hidden.peer_id, 5)


async def test_nobody_is_relayed_to_a_relay() -> None:
    """A place asked for through a relay would be a circuit within a circuit."""
    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        hidden.traversal.offer(True)
        await hide(hidden, middle)
        await caller.connect(hidden.addresses()[0])
        stream = await caller.open_stream(hidden.peer_id, HOP)
        await stream.write(encode_hop(HopMessage(HopType.RESERVE)))
        assert decode_hop(await read_message(stream)).status == Status.PERMISSION_DENIED


async def test_a_peer_that_refuses_its_circuit() -> None:
    async def refuse(stream: Stream) -> None:
        await read_message(stream)
        await stream.write(encode_stop(StopMessage(StopType.STATUS, status=Status.PERMISSION_DENIED)))

    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        await hide(hidden, middle)
        hidden.unserve(STOP)
        hidden.serve(STOP, refuse)
        with pytest.raises(PeerUnreachable, match="CONNECTION_FAILED"):
            await caller.connect(hidden.addresses()[0])
        assert middle.traversal.service.circuits == 0


async def test_a_peer_that_does_not_answer_gives_its_circuits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even whether it speaks the protocol: otherwise a few such peers could take all circuits for ever."""
    monkeypatch.setattr(defaults, "RELAY_ANSWER_SECONDS", 0.2)
    async with relay() as middle, host(listen=()) as hidden, host() as caller:
        await hide(hidden, middle)
        [connection] = [c for c in middle.connections if c.remote == hidden.peer_id]
        connection.agreed.discard(STOP)
        monkeypatch.setattr(middle.introductions, "of", lambda _: None)
        for other in hidden.connections:
            monkeypatch.setattr(other, "_accept", lambda _: None)
        with pytest.raises(PeerUnreachable, match="CONNECTION_FAILED"):
            await caller.connect(hidden.addresses()[0])
        assert middle.traversal.service.circuits == 0


async def test_circuits_of_peers_that_were_not_asked_to_relay_are_refused(
    server: Libp2pHost, client: Libp2pHost
) -> None:
    await client.connect(server.addresses()[0])
    for message, status in (
        (StopMessage(StopType.CONNECT, peer=client.peer_id), Status.PERMISSION_DENIED),
        (StopMessage(StopType.CONNECT), Status.MALFORMED_MESSAGE),
        (StopMessage(StopType.STATUS, status=Status.OK), Status.UNEXPECTED_MESSAGE),
    ):
        stream = await client.open_stream(server.peer_id, STOP)
        await stream.write(encode_stop(message))
        assert decode_stop(await read_message(stream)).status == status
    assert len(server.connected_peers()) == 1
