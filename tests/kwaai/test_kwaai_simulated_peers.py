"""Our servers and client with the simulated KwaaiNet peer, over real hosts: two codecs that share nothing."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kwaai_http import http_server
from kwaai_world import MODEL
from simulator import TINY, Faults, generate_locally, simulated_client, simulated_server

from kwaainet_bridge.compression.kwaai import dequantise_blocks
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import CapacityDenied, HandlerError, WarmingUp
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.mux_client import open_mux
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.kwaai.server import KwaaiProtocols, serve_kwaai
from kwaainet_bridge.kwaai.tensor import send_tensor
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

PROMPT = [1, 42, 99, 300, 7]


@asynccontextmanager
async def our_host():
    identity = Identity.generate("ed25519")
    async with open_host(HostConfig(identity=identity, listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        yield host


@asynccontextmanager
async def our_server(blocks, protocols=None, **settings):
    """A host of ours that serves blocks of the tiny model."""
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(our_host())
        server = await stack.enter_async_context(
            serve_kwaai(host, RpcServer(host), protocols or KwaaiProtocols())
        )
        engine = await Engine.load(EngineConfig(str(MODEL), blocks=blocks, threads=1, **settings))
        stack.push_async_callback(engine.aclose)
        await stack.enter_async_context(server.serving(ServedModel(engine, names=(TINY.prefix,))))
        yield SimpleNamespace(
            host=host, peer_id=str(host.peer_id), address=host.addresses()[0], server=server
        )


async def theirs_through(client, chain, count):
    """Text that the simulated client generates at these servers."""
    position, given, tokens = 0, list(PROMPT), []
    while len(tokens) < count:
        scores = await client._through(chain, 77, position, given)
        position += len(given)
        given = [int(scores.argmax())]
        tokens += given
    return tokens


async def ours_through(client, chain, count):
    """Text that our client generates at these servers, in their order."""
    position, given, tokens = 0, list(PROMPT), []
    first, *others = [PeerId.parse(server.peer_id) for server in chain]
    while len(tokens) < count:
        values = await client.step_ids(first, 2**63 + 5, position, given)
        for other in others:
            values = await client.step_hidden(other, 2**63 + 5, position, values)
        position += len(given)
        given = [int(values[0, 0].argmax())]
        tokens += given
    return tokens


async def test_one_chain_of_both_kinds_of_servers_for_both_kinds_of_clients():
    expected = generate_locally(TINY, PROMPT, 12, boundaries=[2, 6])
    async with (
        our_server(range(2)) as first,
        simulated_server(blocks=range(2, 6)) as middle,
        our_server(range(6, 8)) as last,
        simulated_client() as client,
        our_host() as host,
    ):
        chain = [first, middle, last]
        for server in chain:
            await client.host.connect(server.address)
            await host.connect(server.address)
        assert await theirs_through(client, chain, 12) == expected
        assert await ours_through(KwaaiClient(RpcClient(host)), chain, 12) == expected
        assert middle.complaints == client.complaints == []
        assert [len(s.server._inference.sessions._live) for s in (first, last)] == [2, 2]


async def test_their_client_at_our_server():
    taken = []

    async def take(peer, message):
        taken.append((str(peer), message))

    async def echo(asked):
        return 200, asked.body

    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(http_server(echo))
        protocols = KwaaiProtocols(mux=MuxEndpoint(url=http.url, paths=["/echo"]), tensor=take)
        server = await stack.enter_async_context(our_server(range(4), protocols))
        client = await stack.enter_async_context(simulated_client())
        await client.host.connect(server.address)

        assert await client.hello(server.peer_id, "good day") == "ok"
        lease = await client.lease(server.peer_id, TINY.prefix)
        assert lease.ttl_secs == 30
        assert lease == await client.lease(server.peer_id)

        values = np.linspace(-1, 1, 200, dtype=np.float32).reshape(2, 100)
        await client.send_tensor(server.peer_id, "grid", values, "meta")
        [(sender, message)] = taken
        assert (sender, message.name, message.metadata) == (client.peer_id, "grid", "meta")
        assert np.abs(dequantise_blocks(message.tensor).numpy() - values).max() < 0.005

        async with client.mux(server.peer_id) as mux:
            await mux.request(1, "/echo", b"one", lease_id=lease.lease_id)
            frame = await mux.receive()
            assert (frame.tag, frame.fields["status"]) == ("Response", 200)
            assert bytes(frame.fields["body"]) == b"one"
            await mux.request(2, "/echo", b"two", lease_id=lease.lease_id ^ 1)
            assert (await mux.receive()).fields["status"] == 409
            await mux.send("LeaseRequest", request_id=3, model=None)
            granted = await mux.receive()
            assert (granted.tag, granted.fields["request_id"]) == ("LeaseResponse", 3)
        assert client.complaints == []


async def test_our_client_at_their_server():
    async with simulated_server(blocks=range(8), leases=1) as server, our_host() as host:
        await host.connect(server.address)
        address = PeerId.parse(server.peer_id)
        client = KwaaiClient(RpcClient(host))
        assert await client.hello(address, "good day") == "ok"
        assert server.greetings[-1] == (str(host.peer_id), "good day")
        assert (await client.lease(address)).ttl_secs == 30
        async with our_host() as other:
            await other.connect(server.address)
            with pytest.raises(CapacityDenied):
                await KwaaiClient(RpcClient(other)).lease(address)
        assert await ours_through(client, [server], 8) == generate_locally(TINY, PROMPT, 8, boundaries=[])
        await send_tensor(host, address, "grid", torch.linspace(-1, 1, 200), timeout=10)
        async with open_mux(host, address, open_timeout=10) as mux:
            assert await mux.request("POST", "/echo", b"hi", timeout=10) == (200, b"hi")
        assert server.complaints == []


async def test_what_their_server_says_when_it_cannot():
    async with (
        simulated_server(blocks=range(8), warming_up=True, faults=Faults()) as server,
        our_host() as host,
    ):
        await host.connect(server.address)
        address = PeerId.parse(server.peer_id)
        client = KwaaiClient(RpcClient(host))
        with pytest.raises(WarmingUp):
            await client.step_ids(address, 1, 0, PROMPT)
        await server.finish_warming_up()
        await client.step_ids(address, 1, 0, PROMPT)
        with pytest.raises(HandlerError):
            await client.step_hidden(address, 2, 0, torch.zeros(1, 2, 64))
