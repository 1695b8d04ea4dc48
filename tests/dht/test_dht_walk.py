"""Walks through DHTs on a network in memory."""

from __future__ import annotations

import random

import pytest
import trio
from dht_nodes import clock, peer_id, swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtId
from kwaainet_bridge.hivemind.dht.messages import FIND, PING
from kwaainet_bridge.hivemind.dht.walk import walk
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.pb import dht_pb2 as pb


async def start_walk(nodes, first, **options):
    host = nodes.host()
    return await walk(
        RpcClient(host), [first], own=host.peer_id, clock=clock, rng=random.Random(1), **options
    )


async def test_everybody_is_met_from_any_node(autojump_clock) -> None:
    async with swarm(100) as nodes:
        client = await nodes.start(client_mode=True)
        met = await start_walk(nodes, nodes.nodes[50].peer_id)
        servers = {node.peer_id: node.node_id for node in nodes.nodes if node is not client}
    assert met.complete
    assert {node.peer: node.node_id for node in met.nodes} == servers
    assert all(node.error == "" and node.ahead == 0 and node.neighbours > 10 for node in met.nodes)


async def test_a_walk_is_remembered_by_nobody(autojump_clock) -> None:
    async with swarm(3) as nodes:
        before = [len(node.neighbours()) for node in nodes.nodes]
        await start_walk(nodes, nodes.nodes[0].peer_id)
        assert [len(node.neighbours()) for node in nodes.nodes] == before


async def test_clocks_are_compared(autojump_clock) -> None:
    async with swarm(1) as nodes:
        await nodes.start(join=False, clock=lambda: clock() - 40.0)
        met = await start_walk(nodes, nodes.nodes[1].peer_id)
    assert met.nodes[0].ahead == pytest.approx(-40.0)


async def test_a_node_that_is_gone_is_told_with_its_id(autojump_clock) -> None:
    async with swarm(5) as nodes:
        gone = nodes.nodes[2]
        nodes.take_down(gone)
        met = await start_walk(nodes, nodes.nodes[0].peer_id)
    assert len(met.nodes) == 5
    (failed,) = [node for node in met.nodes if node.error]
    assert (failed.peer, failed.node_id, failed.seconds) == (gone.peer_id, gone.node_id, None)
    assert met.complete


async def test_nobody_answers(autojump_clock) -> None:
    async with swarm(1) as nodes:
        met = await start_walk(nodes, peer_id(77))
    assert [node.peer for node in met.nodes] == [peer_id(77)]
    assert "not on this network" in met.nodes[0].error


async def test_answers_are_told_at_once(autojump_clock) -> None:
    told = []

    async def on_answer(peer):
        await trio.lowlevel.checkpoint()
        told.append(peer)

    async with swarm(5) as nodes:
        nodes.take_down(nodes.nodes[4])
        await start_walk(nodes, nodes.nodes[0].peer_id, on_answer=on_answer)
        assert set(told) == {node.peer_id for node in nodes.nodes[:4]}


class Inventor:
    """A node that names nobody but ever new peers."""

    def __init__(self, server: RpcServer, *, per_answer: int) -> None:
        self.named = 10**6
        self.per_answer = per_answer
        server.mount(FIND, self.find)
        server.mount(PING, self.ping)

    async def find(self, request: pb.FindRequest, _) -> pb.FindResponse:
        response = pb.FindResponse(peer=pb.NodeInfo(node_id=bytes(20)))
        for _ in request.keys:
            result = response.results.add()
            for _ in range(self.per_answer):
                self.named += 1
                result.nearest_node_ids.append(DhtId(self.named).to_bytes())
                result.nearest_peer_ids.append(peer_id(self.named).raw)
        return response

    async def ping(self, _request, _context) -> pb.PingResponse:
        return pb.PingResponse(peer=pb.NodeInfo(node_id=bytes(20)))


async def test_invented_peers_end_a_walk_by_its_limit_and_hide_nobody(autojump_clock) -> None:
    async with swarm(30) as nodes:
        hostile = nodes.host()
        Inventor(RpcServer(hostile), per_answer=100)
        host = nodes.host()
        start = [hostile.peer_id, nodes.nodes[0].peer_id]
        met = await walk(RpcClient(host), start, own=host.peer_id, clock=clock, max_peers=200)
        honest = {node.peer_id for node in nodes.nodes}
    assert not met.complete
    assert len(met.nodes) == 200
    answered = {node.peer: node for node in met.nodes if not node.error}
    assert honest <= answered.keys()
    assert answered[hostile.peer_id].ahead is None  # it told no time


async def test_peers_that_stay_silent_end_a_walk_by_its_time(autojump_clock) -> None:
    class Silent(Inventor):
        async def ping(self, _request, _context) -> pb.PingResponse:
            await trio.sleep_forever()
            raise AssertionError

    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        start = []
        for number in range(2000):
            host = network.host(peer_id(number + 1))
            Silent(RpcServer(host), per_answer=0)
            start.append(host.peer_id)
        host = network.host(peer_id(9999))
        began = trio.current_time()
        met = await walk(RpcClient(host), start, own=host.peer_id, clock=clock, max_peers=10**6)
        assert trio.current_time() - began == pytest.approx(defaults.WALK_SECONDS)
        nursery.cancel_scope.cancel()
    assert not met.complete
    assert all("within" in node.error or "in time" in node.error for node in met.nodes), met.nodes[0]


def answer_too_little(response: pb.FindResponse) -> None:
    response.results.pop()


def name_no_peer(response: pb.FindResponse) -> None:
    response.results[0].nearest_peer_ids[0] = b"no peer id"


def name_no_node(response: pb.FindResponse) -> None:
    response.results[0].nearest_node_ids[0] = bytes(21)


@pytest.mark.parametrize("break_it", [answer_too_little, name_no_peer, name_no_node])
async def test_answers_that_break_the_protocol(autojump_clock, break_it) -> None:
    class Broken(Inventor):
        async def find(self, request: pb.FindRequest, context) -> pb.FindResponse:
            response = await super().find(request, context)
            break_it(response)
            return response

    async with swarm(1) as nodes:
        host = nodes.host()
        Broken(RpcServer(host), per_answer=1)
        met = await start_walk(nodes, host.peer_id)
    (node,) = met.nodes
    assert node.error
    assert met.complete
