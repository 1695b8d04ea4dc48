"""Relays of either kind, for peers of either kind: who relays, who hides and who calls."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing
from echo_protocol import echo
from test_stock_peers import STOCK_PYTHON, StockPeer, StockProcess, another_peer, call, payload

from kwaainet_bridge.errors import PeerUnreachable
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.identity import Identity

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def stock_process():
    if not STOCK_PYTHON.exists():
        pytest.fail("no stock environment: make peers")
    process = StockProcess()
    with process.process:
        yield process
        process.process.stdin.close()


@pytest.fixture(scope="module")
def stock_relay(stock_process: StockProcess) -> StockPeer:
    """It carries 128 KiB in one circuit. One that believes itself public carries 4 GiB, or not: of two services
    that it starts, the last one wins."""
    return StockPeer(stock_process)


def hidden_host():
    return open_host(HostConfig(Identity.generate("ed25519"), listen=()))


async def until(condition) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.01)


async def hide(hidden: Libp2pHost, relay_address: str) -> str:
    """Take a place at a relay; the address that leads there."""
    hidden.serve("Echo.run", echo)
    await hidden.connect(relay_address)
    await hidden.wait_identified()
    hidden.traversal.keeper.want(True)
    await until(hidden.addresses)
    push = hidden.introductions._push
    await until(lambda: push._told and set(push._told.values()) == {push._version})
    return hidden.addresses()[0]


async def test_a_stock_peer_calls_us_through_a_stock_relay(stock_relay: StockPeer) -> None:
    """It knows the relay and our id, and nothing else."""
    async with hidden_host() as hidden:
        assert (
            await hide(hidden, stock_relay.address)
            == f"{stock_relay.address}/p2p-circuit/p2p/{hidden.peer_id}"
        )
        async with another_peer(stock_relay, stock_relay.address) as caller:
            for size in (5, 50_000):
                digest = await caller.do("call", peer=str(hidden.peer_id), size=size)
                assert digest == hashlib.sha256(payload(size)).hexdigest()
            [inbound] = [c for c in hidden.connections if c.remote == caller.peer_id]
            assert inbound.relay == stock_relay.peer_id


async def test_we_call_ours_through_a_stock_relay(stock_relay: StockPeer, client: Libp2pHost) -> None:
    async with hidden_host() as hidden:
        address = await hide(hidden, stock_relay.address)
        [reservation] = hidden.traversal.keeper.reservations
        assert reservation.limit is not None
        await client.connect(address)
        assert await call(client, hidden.peer_id, 50_000) == payload(50_000)


async def test_without_a_place_a_stock_relay_refuses(stock_relay: StockPeer, client: Libp2pHost) -> None:
    async with hidden_host() as hidden:
        await hidden.connect(stock_relay.address)
        with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
            await client.connect(f"{stock_relay.address}/p2p-circuit/p2p/{hidden.peer_id}")


async def test_a_stock_peer_is_called_through_our_relays(stock_relay: StockPeer, client: Libp2pHost) -> None:
    """A daemon that believes itself private takes places here: at once if it knows four relays, else after minutes."""
    async with AsyncExitStack() as stack:
        relays = [
            await stack.enter_async_context(open_host(HostConfig(Identity.generate("ed25519"))))
            for _ in range(4)
        ]
        for relay in relays:
            relay.traversal.offer(True)
        addresses = [relay.addresses()[0] for relay in relays]
        hidden = await stack.enter_async_context(
            another_peer(
                stock_relay,
                *addresses,
                use_auto_relay=True,
                force_reachability="private",
                trusted_relays=addresses,
            )
        )
        await until(lambda: any(relay.traversal.service.reservations for relay in relays))
        relay = next(relay for relay in relays if relay.traversal.service.reservations)
        circuit = f"{relay.addresses()[0]}/p2p-circuit/p2p/{hidden.peer_id}"
        await client.connect(circuit)
        assert await call(client, hidden.peer_id, 1 << 20) == payload(1 << 20)
        # it may find us again by itself, and directly
        assert relay.peer_id in [c.relay for c in client.connections if c.remote == hidden.peer_id]
        # a stock peer that knows nothing but the relay and the id
        async with another_peer(stock_relay, relay.addresses()[0]) as caller:
            digest = await caller.do("call", peer=str(hidden.peer_id), size=1 << 20)
            assert digest == hashlib.sha256(payload(1 << 20)).hexdigest()
