"""What the swarm is told about this node, and when."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.announcer import Announcer
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


def peer(number):
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


ANNOUNCER = str(peer(1))


class Pair:
    """A node that announces and a node that reads."""

    def __init__(self, network, stack, clock):
        self.network, self.stack, self.clock = network, stack, clock

    async def start(self):
        self.announcing = await self._node(1)
        self.reading = await self._node(2)
        await self.reading.bootstrap([peer(1)])
        await self.announcing.bootstrap([peer(2)])
        return self

    async def _node(self, number):
        host = self.network.host(peer(number))
        dht = DhtNode(host, RpcServer(host), RpcClient(host), clock=self.clock)
        return await self.stack.enter_async_context(dht.running())

    def announcer(self, prefix="m-hf", **settings):
        info = ServerInfo(ServerState.JOINING, 0.0, start_block=2, end_block=4)
        return Announcer(self.announcing, prefix, info, model_blocks=8, clock=self.clock, **settings)

    async def record(self, key, subkey=ANNOUNCER):
        found = await self.reading.get(key)
        return found.value.get(subkey) if found else None

    async def info(self, block):
        entry = await self.record(f"m-hf.{block}")
        return entry and ServerInfo.from_value(entry.value)


@pytest.fixture
async def pair():
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        yield await Pair(MemoryNetwork(nursery), stack, lambda: 1e9 + trio.current_time()).start()
        nursery.cancel_scope.cancel()


async def test_every_block_of_the_span_and_no_other(pair, autojump_clock):
    announcer = pair.announcer(cache_tokens=lambda: 100)
    announcer.set_throughput(Throughput(12.5, inference_rps=3.0))
    report = await announcer.announce(ServerState.ONLINE)
    assert (report.records, report.acknowledged, report.by_others) == (3, 3, 3)
    assert [await pair.info(b) for b in (1, 4)] == [None, None]
    for block in (2, 3):
        info = await pair.info(block)
        assert (info.state, info.throughput, info.inference_rps) == (ServerState.ONLINE, 12.5, 3.0)
        assert (info.start_block, info.end_block) == (2, 4)
        assert info.cache_tokens_left == 200  # keys and values apart


async def test_model_registry(pair, autojump_clock):
    await pair.announcer(repository="someone/m").announce(ServerState.ONLINE)
    entry = await pair.record("_petals.models", "m-hf")
    assert entry.value == {"num_blocks": 8, "repository": "https://huggingface.co/someone/m"}


async def test_private_models_are_not_registered(pair, autojump_clock):
    report = await pair.announcer(prefix="_m").announce(ServerState.ONLINE)
    assert report.records == 2
    assert await pair.record("_petals.models", "_m") is None


async def test_states_follow_each_other(pair, autojump_clock):
    announcer = pair.announcer()
    for state in (ServerState.JOINING, ServerState.ONLINE, ServerState.OFFLINE):
        await trio.sleep(0.01)
        report = await announcer.announce(state)
        assert report.ok
        assert report.state is state
        assert (await pair.info(2)).state is state


async def test_records_are_renewed_and_expire(pair, autojump_clock):
    announcer = pair.announcer()
    async with trio.open_nursery() as nursery:
        await announcer.announce(ServerState.ONLINE)
        nursery.start_soon(announcer.run)
        first = (await pair.record("m-hf.2")).expiration
        await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS * 1.5)
        later = await pair.record("m-hf.2")
        assert later.expiration == pytest.approx(first + defaults.ANNOUNCE_PERIOD_SECONDS)
        nursery.cancel_scope.cancel()
    await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS * (defaults.ANNOUNCE_LIFETIME_PERIODS + 1))
    assert await pair.info(2) is None


async def test_alone_the_report_says_so(autojump_clock):
    async with trio.open_nursery() as nursery:
        host = MemoryNetwork(nursery).host(peer(1))
        dht = DhtNode(host, RpcServer(host), RpcClient(host))
        async with dht.running():
            info = ServerInfo(ServerState.JOINING, 0.0, start_block=0, end_block=1)
            report = await Announcer(dht, "m-hf", info, model_blocks=1).announce(ServerState.ONLINE)
        assert (report.ok, report.by_others) == (True, 0)
        nursery.cancel_scope.cancel()


def test_a_span_is_needed():
    with pytest.raises(ValueError, match="span"):
        Announcer(None, "m", ServerInfo(ServerState.JOINING, 0.0), model_blocks=1)


async def test_nothing_is_announced_while_nobody_can_dial_the_node(pair, autojump_clock):
    announcer = pair.announcer()
    announcer.dialable = False
    for state in (ServerState.JOINING, ServerState.ONLINE, ServerState.OFFLINE):
        assert (await announcer.announce(state)).records == 0
    assert await pair.info(2) is None
    assert await pair.record("_petals.models", "m-hf") is None


async def test_a_node_that_can_no_longer_be_dialled_withdraws_and_returns(pair, autojump_clock):
    announcer = pair.announcer()
    async with trio.open_nursery() as nursery:
        await announcer.announce(ServerState.ONLINE)
        nursery.start_soon(announcer.run)
        await trio.sleep(1)
        announcer.dialable = False
        assert (await announcer.announce(announcer.wanted)).state is ServerState.OFFLINE
        assert (await pair.info(2)).state is ServerState.OFFLINE
        await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS * (defaults.ANNOUNCE_LIFETIME_PERIODS + 1))
        assert await pair.info(2) is None  # and is not renewed
        announcer.dialable = True
        await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS)
        assert (await pair.info(2)).state is ServerState.ONLINE
        nursery.cancel_scope.cancel()
