from __future__ import annotations

import contextlib
import random

import trio

from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


async def test_swarm(autojump_clock):
    clock = lambda: 1.7e9 + trio.current_time()
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        net = MemoryNetwork(nursery)
        nodes = []
        for i in range(40):
            host = net.host(PeerId(b"\x12\x20" + bytes([i]) * 32))
            node = DhtNode(host, RpcServer(host), RpcClient(host), clock=clock, rng=random.Random(i))
            await stack.enter_async_context(node.running())
            if nodes:
                r = await node.bootstrap([random.Random(i).choice(nodes).peer_id])
                assert all(x.ok for x in r), r
            nodes.append(node)
        res = await nodes[3].store_many([Item(f"key{i}", i, clock() + 100) for i in range(50)])
        assert all(len(r.accepted) == 5 for r in res), res
        got = await nodes[20].get_many([f"key{i}" for i in range(50)])
        assert all(got[f"key{i}"].value == i for i in range(50))
        nursery.cancel_scope.cancel()
