"""Hole punching: what is agreed, what is dialled, and what is refused. Real routers are in the laboratory."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
from test_relays import hide, host, relay, until

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import StreamReset
from kwaainet_bridge.net import Libp2pHost, hole_punching
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.circuit import read_message
from kwaainet_bridge.wire.circuit import DCUTR, PunchType, decode_punch, encode_punch


@pytest.fixture
def everywhere_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hole_punching, "private_block", lambda _: None)


async def relayed_pair(stack: AsyncExitStack) -> tuple[Libp2pHost, Libp2pHost]:
    """A host that does not listen, and one that has called it through a relay."""
    middle = await stack.enter_async_context(relay())
    hidden = await stack.enter_async_context(host(listen=()))
    caller = await stack.enter_async_context(host())
    await hide(hidden, middle)
    await caller.connect(hidden.addresses()[0])
    return hidden, caller


async def test_a_caller_that_can_be_dialled_is_dialled(everywhere_public: None) -> None:
    """There is no need for a hole then: the side that cannot be dialled simply dials."""
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        await until(lambda: hidden.traversal.has_direct_connection(caller.peer_id))
        await until(lambda: caller.traversal.has_direct_connection(hidden.peer_id))
        assert caller.connections.find(hidden.peer_id).relay is None


async def test_private_addresses_are_not_dialled() -> None:
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        await connection.identified.wait()
        assert not await hidden.traversal._puncher.upgrade(connection)
        assert not hidden.traversal.has_direct_connection(caller.peer_id)


async def test_both_dial_what_the_other_names(
    everywhere_public: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        dials: list[tuple[str, int, bool | None]] = []
        hidden, caller = await relayed_pair(stack)
        for one, port in ((hidden, 1001), (caller, 2002)):

            async def dial_at(
                peer, address: Address, *, responder: bool, punch: bool, name=str(port)
            ) -> None:
                assert punch
                dials.append((name, address.port, responder))
                raise ConnectionRefusedError

            monkeypatch.setattr(one.traversal, "dial_at", dial_at)
            named = [Address("ip4", "5.5.5.5", port)]
            monkeypatch.setattr(one.traversal, "punching_addresses", lambda named=named: named)
            monkeypatch.setattr(one.traversal, "where", lambda _: [])
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        for other in (*hidden.connections, *caller.connections):
            await other.identified.wait()
        assert not await hidden.traversal._puncher.upgrade(connection)
        await until(lambda: len(dials) >= 2 * defaults.HOLE_PUNCH_ATTEMPTS)
        # the side that was called begins, and plays both parts of the handshake in turn
        assert {dial for dial in dials if dial[0] == "1001"} == {
            ("1001", 2002, False),
            ("1001", 2002, True),
        }
        assert {dial for dial in dials if dial[0] == "2002"} == {("2002", 1001, None)}


async def test_a_direct_connection_needs_no_hole(server: Libp2pHost, client: Libp2pHost) -> None:
    await client.connect(server.addresses()[0])

    async def ask() -> None:
        stream = await client.open_stream(server.peer_id, DCUTR)
        await stream.write(encode_punch(PunchType.CONNECT))
        await stream.read(1)

    with pytest.raises(StreamReset):
        await ask()
    assert client.connections.find(server.peer_id) is not None


@pytest.mark.parametrize("message", [encode_punch(PunchType.SYNC), b"\x01\xff", b"\xff\x7f"])
async def test_malformed_messages_end_the_stream_only(message: bytes) -> None:
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        stream = await hidden.open_stream_on(connection, DCUTR)
        await stream.write(message)
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.read(1)
        assert hidden.connections.find(caller.peer_id) is not None


async def test_without_an_address_of_its_own_a_host_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        stream = await hidden.open_stream_on(connection, DCUTR)
        await stream.write(encode_punch(PunchType.CONNECT, [Address("ip4", "5.5.5.5", 1).binary]))
        with pytest.raises(StreamReset), trio.fail_after(5):
            decode_punch(await read_message(stream))


async def test_a_peer_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "RELAY_ANSWER_SECONDS", 0.2)
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        await connection.identified.wait()
        monkeypatch.setattr(hidden.traversal, "punching_addresses", lambda: [Address("ip4", "5.5.5.5", 1)])
        monkeypatch.setattr(hidden.introductions, "of", lambda _: None)  # so that its consent is waited for
        for other in caller.connections:
            monkeypatch.setattr(other, "_accept", lambda _: None)
        with trio.fail_after(5):
            assert not await hidden.traversal._puncher.upgrade(connection)
        assert not connection.in_use


async def test_strangers_have_few_dials(everywhere_public: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls through a relay names the addresses, and they may be anybody's."""
    async with AsyncExitStack() as stack:
        hidden, caller = await relayed_pair(stack)
        [connection] = [c for c in hidden.connections if c.remote == caller.peer_id]
        await until(lambda: hidden.traversal.has_direct_connection(caller.peer_id))
        dials: list[Address] = []

        async def dial_at(_peer, address: Address, **_how: bool) -> None:
            dials.append(address)
            raise ConnectionRefusedError

        victims = [Address("ip4", "5.5.5.5", port) for port in range(1, 100)]
        monkeypatch.setattr(hidden.traversal, "dial_at", dial_at)
        monkeypatch.setattr(hidden.traversal, "where", lambda _: victims)
        monkeypatch.setattr(hidden.traversal, "has_direct_connection", lambda _: False)
        for _ in range(100):
            assert not await hidden.traversal._puncher.upgrade(connection)
        assert len(dials) <= defaults.HOLE_PUNCHES_PER_PEER * defaults.MAX_SUPPOSED_ADDRESSES
