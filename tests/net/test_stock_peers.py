"""Our host and Hivemind's daemon, in both directions."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import PeerUnreachable, ProtocolNotSupported, StreamReset
from kwaainet_bridge.net import Host, HostConfig, Libp2pHost, autonat, open_host
from kwaainet_bridge.net.addresses import parse_address
from kwaainet_bridge.net.identity import Identity, load_identity
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.rpc import RpcClient, unary
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

pytestmark = pytest.mark.interop

PEERS = Path(os.environ.get("KWAAINET_BRIDGE_PEERS", Path(__file__).parents[2] / ".venv-peers"))
STOCK_PYTHON = PEERS / "bin" / "python"
DRIVER = Path(__file__).with_name("stock_driver.py")


class StockError(Exception):
    """What the stock side raised."""


class StockProcess:
    """The process in which all stock peers live."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [STOCK_PYTHON, DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.numbers = itertools.count()

    def do(self, command: str, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise StockError(answer["error"])
        return answer["ok"]


class StockPeer:
    def __init__(self, process: StockProcess, **options: Any) -> None:
        self.process = process
        self.number = next(process.numbers)
        self.address: str = process.do("start", at=self.number, **options)
        self.peer_id = PeerId.parse(self.address.rpartition("/p2p/")[2])

    async def do(self, command: str, **arguments: Any) -> Any:
        return await trio.to_thread.run_sync(partial(self.process.do, command, at=self.number, **arguments))


@pytest.fixture(scope="module")
def stock() -> Iterator[StockPeer]:
    """One stock peer for all tests that need no fresh one."""
    if not STOCK_PYTHON.exists():
        pytest.fail("no stock environment: make peers")
    process = StockProcess()
    with process.process:
        yield StockPeer(process)
        process.process.stdin.close()  # its peers end with it


@asynccontextmanager
async def another_peer(stock: StockPeer, *initial_peers: str, **options: Any) -> AsyncIterator[StockPeer]:
    peer = await trio.to_thread.run_sync(
        partial(StockPeer, stock.process, initial_peers=initial_peers, **options)
    )
    try:
        yield peer
    finally:
        with trio.CancelScope(shield=True):
            await peer.do("stop")


@asynccontextmanager
async def our_host(**options: Any) -> AsyncIterator[Libp2pHost]:
    async with open_host(HostConfig(Identity.generate("ed25519"), **options)) as host:
        host.serve("Echo.run", echo)
        yield host


def payload(size: int) -> bytes:
    return bytes(i % 251 for i in range(size))


async def call(host: Host, peer: PeerId, size: int) -> bytes:
    stream = await host.open_stream(peer, "Echo.run")
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, payload(size))
        while len(received) < size:
            data = await stream.read(65536)
            assert data
            received += data
    await stream.close()
    return bytes(received)


@pytest.mark.parametrize("size", [5, 1 << 20])
async def test_we_dial_and_call(client: Host, stock: StockPeer, size: int) -> None:
    assert await client.connect(stock.address) == stock.peer_id
    assert await call(client, stock.peer_id, size) == payload(size)


@pytest.mark.parametrize("size", [5, 192 << 10, 1 << 20])
async def test_we_call_without_waiting_for_consent(client: Host, stock: StockPeer, size: int) -> None:
    await client.connect(stock.address)
    await client.wait_identified()
    for _ in range(3):
        assert await call(client, stock.peer_id, size) == payload(size)


@pytest.mark.parametrize("size", [0, 1000, 192 << 10, 1 << 20])
async def test_their_refusal_of_a_protocol_that_we_took_for_served(
    client: Host, stock: StockPeer, size: int
) -> None:
    await client.connect(stock.address)
    client.connections.find(stock.peer_id).agreed.add("Nope.rpc")
    method = unary("Nope.rpc", ExpertRequest, ExpertResponse)
    with pytest.raises(ProtocolNotSupported, match=r"Nope\.rpc"):
        await RpcClient(client).call(stock.peer_id, method, ExpertRequest(metadata=bytes(size)), timeout=10)
    assert await call(client, stock.peer_id, 5) == payload(5)


@pytest.mark.parametrize("size", [5, 1 << 20])
async def test_they_dial_and_call(server: Host, stock: StockPeer, size: int) -> None:
    await stock.do("connect", address=server.addresses()[0])
    assert server.connected_peers() == [stock.peer_id]
    digest = await stock.do("call", peer=str(server.peer_id), size=size)
    assert digest == hashlib.sha256(payload(size)).hexdigest()


async def test_two_hundred_streams_at_once(client: Host, stock: StockPeer) -> None:
    await client.connect(stock.address)

    async def one() -> None:
        # Its Python takes 100 new streams at a time from the daemon, which resets what is beyond that.
        while True:
            with contextlib.suppress(StreamReset):
                assert await call(client, stock.peer_id, 1000) == payload(1000)
                return

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(one)
    connection = client.connections.find(stock.peer_id)
    with trio.fail_after(5):
        # The daemon closes its ends in its own time, and keeps a Kademlia stream of its own.
        while connection.open_streams > 1:
            await connection.ping()


async def test_identify_and_ping(client: Host, stock: StockPeer) -> None:
    await client.connect(stock.address)
    assert await ping(client, stock.peer_id) < 5
    await client.wait_identified()
    said = client.description(stock.peer_id)
    assert said.agent == "p2pd/0.1"
    assert "/ipfs/kad/1.0.0" in said.protocols
    assert "Echo.run" in said.protocols
    assert stock.address.partition("/p2p/")[0] in map(str, said.addresses)


async def test_a_protocol_nobody_serves(server: Host, stock: StockPeer) -> None:
    await server.connect(stock.address)
    with pytest.raises(ProtocolNotSupported):
        await server.open_stream(stock.peer_id, "Nope.rpc")
    with pytest.raises(StockError, match="protocols not supported"):
        await stock.do("call", peer=str(server.peer_id), size=1, protocol="Nope.rpc")


async def test_a_handler_added_after_identify(server: Host, stock: StockPeer) -> None:
    await server.connect(stock.address)
    await stock.do("call", peer=str(server.peer_id), size=10)
    server.serve("Late.run", echo)
    await stock.do("call", peer=str(server.peer_id), size=10, protocol="Late.run")


async def test_a_handler_that_came_and_went_after_identify(server: Host, stock: StockPeer) -> None:
    """A daemon that was pushed the new list opens streams by it."""
    await server.connect(stock.address)
    await stock.do("call", peer=str(server.peer_id), size=10)
    server.serve("Passing.run", echo)
    await trio.sleep(2 * defaults.IDENTIFY_PUSH_SECONDS)
    await stock.do("call", peer=str(server.peer_id), size=10, protocol="Passing.run")
    server.unserve("Passing.run")
    await trio.sleep(2 * defaults.IDENTIFY_PUSH_SECONDS)
    with pytest.raises(StockError, match="protocols not supported"):
        await stock.do("call", peer=str(server.peer_id), size=10, protocol="Passing.run")


async def test_they_find_us_by_peer_id_alone(server: Host, stock: StockPeer) -> None:
    """A Go peer admits us to its table, and a second one finds us through it."""
    await server.connect(stock.address)
    async with another_peer(stock, stock.address) as stranger:
        digest = await stranger.do("call", peer=str(server.peer_id), size=100)
        assert digest == hashlib.sha256(payload(100)).hexdigest()
        assert stranger.peer_id in server.connected_peers()


async def test_they_find_each_other_through_us(server: Host, stock: StockPeer) -> None:
    await server.connect(stock.address)
    async with another_peer(stock, server.addresses()[0]) as stranger:
        digest = await stranger.do("call", peer=str(stock.peer_id), size=100)
        assert digest == hashlib.sha256(payload(100)).hexdigest()


async def test_we_find_them_by_peer_id_alone(client: Host, stock: StockPeer) -> None:
    async with another_peer(stock, stock.address) as hidden:
        await client.connect(stock.address)
        assert await call(client, hidden.peer_id, 100) == payload(100)


async def test_in_client_mode_we_find_them_and_they_us(stock: StockPeer) -> None:
    """A daemon names a peer that it is connected to, in its table or not."""
    async with (
        our_host(kad_mode="client") as ours,
        another_peer(stock, stock.address) as hidden,
        another_peer(stock, stock.address) as stranger,
    ):
        await ours.connect(stock.address)
        assert await call(ours, hidden.peer_id, 100) == payload(100)
        digest = await stranger.do("call", peer=str(ours.peer_id), size=100)
        assert digest == hashlib.sha256(payload(100)).hexdigest()


async def test_in_client_mode_we_are_in_nobodys_table(stock: StockPeer) -> None:
    async with our_host(kad_mode="client") as ours, another_peer(stock, ours.addresses()[0]) as stranger:
        await ours.connect(stock.address)
        with pytest.raises(StockError, match="failed to find any peer in table"):
            await stranger.do("call", peer=str(stock.peer_id), size=100)


async def test_networks_with_other_ids_do_not_meet(stock: StockPeer) -> None:
    async with (
        our_host(kad_protocol="/kwaai/kad/1.0.0") as ours,
        another_peer(stock, stock.address) as hidden,
        another_peer(stock, ours.addresses()[0]) as stranger,
    ):
        await ours.connect(stock.address)
        with pytest.raises(PeerUnreachable, match="no address is known"):
            await ours.open_stream(hidden.peer_id, "Echo.run")
        with pytest.raises(StockError, match="failed to find any peer in table"):
            await stranger.do("call", peer=str(stock.peer_id), size=100)


async def test_nobody_knows(client: Host, stock: StockPeer) -> None:
    await client.connect(stock.address)
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await client.open_stream(Identity.generate("ed25519").peer_id, "Echo.run")


async def test_a_killed_peer_is_noticed(client: Host, stock: StockPeer) -> None:
    async with another_peer(stock, stock.address) as doomed:
        await client.connect(doomed.address)
        stream = await client.open_stream(doomed.peer_id, "Echo.run")
        await doomed.do("kill")
        with trio.fail_after(5):
            await client.wait_disconnected(doomed.peer_id)
        with pytest.raises(StreamReset):
            await stream.read(1)
        assert client.connected_peers() == []


# --- AutoNAT


async def test_they_do_not_dial_private_addresses_back(client: Libp2pHost, stock: StockPeer) -> None:
    await client.connect(stock.address)
    own = [a for a in map(parse_address, client.addresses()) if a is not None]
    verdict = await autonat.ask(client, stock.peer_id, own)
    assert verdict == autonat.DialBack(None, text="refusing to dial peer with blocked observed address")


# --- identity files


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
async def test_they_read_our_identity(tmp_path: Path, stock: StockPeer, kind) -> None:
    path = tmp_path / "ours.key"
    with load_identity(path, kind=kind) as identity:
        pass
    async with another_peer(stock, identity_path=str(path)) as theirs:
        assert theirs.peer_id == identity.peer_id


async def test_we_read_their_identity(tmp_path: Path, server: Host, stock: StockPeer) -> None:
    path = tmp_path / "theirs.key"
    async with another_peer(stock, identity_path=str(path)) as theirs:
        pass
    with load_identity(path) as identity:
        assert identity.peer_id == theirs.peer_id
        async with open_host(HostConfig(identity)) as host:
            assert await host.connect(server.addresses()[0]) == server.peer_id
            assert server.connected_peers() == [theirs.peer_id]
