"""What the swarms are told about this node, and when."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.kwaai.records import NodeInfo, network_prefix
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.node.announcing import Announcer, KwaaiPublisher, Offer, PetalsPublisher
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


def peer(number):
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


ANNOUNCER = str(peer(1))


def offer(**facts):
    return Offer(range(2, 4), **{"model_blocks": 8, "repository": None, "torch_dtype": "float32"} | facts)


class Pair:
    """A node that announces and a node that reads."""

    def __init__(self, network, stack, clock):
        self.network, self.stack, self.clock = network, stack, clock

    async def start(self):
        self.announcing = await self._node(1)
        self.reading = await self._node(2)
        # KwaaiNet's bootstrap peers, and this node's view of their DHT
        self.boots = [await self._node(number) for number in (11, 12)]
        self.view = await self._node(13, client_mode=True)
        await self.reading.bootstrap([peer(1)])
        await self.announcing.bootstrap([peer(2)])
        return self

    async def _node(self, number, **options):
        host = self.network.host(peer(number))
        dht = DhtNode(host, RpcServer(host), RpcClient(host), clock=self.clock, **options)
        return await self.stack.enter_async_context(dht.running())

    def announcer(self, prefix="m-hf", *, reports=None, also=(), **facts):
        publishers = [PetalsPublisher(self.announcing, prefix), *also]
        on_report = (lambda _report: None) if reports is None else reports.append
        return Announcer(offer(**facts), publishers, clock=self.clock, on_report=on_report)

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
    announcer.offer.throughput = Throughput(12.5, inference_rps=3.0)
    (report,) = await announcer.announce(ServerState.ONLINE)
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
    (report,) = await pair.announcer(prefix="_m").announce(ServerState.ONLINE)
    assert report.records == 2
    assert await pair.record("_petals.models", "_m") is None


async def test_states_follow_each_other(pair, autojump_clock):
    announcer = pair.announcer()
    for state in (ServerState.JOINING, ServerState.ONLINE, ServerState.OFFLINE):
        await trio.sleep(0.01)
        (report,) = await announcer.announce(state)
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
            announcer = Announcer(offer(), [PetalsPublisher(dht, "m-hf")])
            (report,) = await announcer.announce(ServerState.ONLINE)
        assert (report.ok, report.by_others) == (True, 0)
        nursery.cancel_scope.cancel()


async def test_nothing_is_announced_while_nobody_can_dial_the_node(pair, autojump_clock):
    announcer = pair.announcer()
    announcer.dialable = False
    for state in (ServerState.JOINING, ServerState.ONLINE, ServerState.OFFLINE):
        assert await announcer.announce(state) == []
    assert await pair.info(2) is None
    assert await pair.record("_petals.models", "m-hf") is None


async def test_a_node_that_can_no_longer_be_dialled_withdraws_and_returns(pair, autojump_clock):
    announcer = pair.announcer()
    async with trio.open_nursery() as nursery:
        await announcer.announce(ServerState.ONLINE)
        nursery.start_soon(announcer.run)
        await trio.sleep(1)
        announcer.dialable = False
        (report,) = await announcer.announce(announcer.wanted)
        assert report.state is ServerState.OFFLINE
        assert (await pair.info(2)).state is ServerState.OFFLINE
        await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS * (defaults.ANNOUNCE_LIFETIME_PERIODS + 1))
        assert await pair.info(2) is None  # and is not renewed
        announcer.dialable = True
        await trio.sleep(defaults.ANNOUNCE_PERIOD_SECONDS)
        assert (await pair.info(2)).state is ServerState.ONLINE
        nursery.cancel_scope.cancel()


# --- KwaaiNet ---------------------------------------------------------------------------------------------


async def test_one_truth_is_written_twice(pair, autojump_clock):
    """Petals' records go to the nodes nearest to their keys, KwaaiNet's to each of its bootstrap peers."""
    boots, view = pair.boots, pair.view
    await view.bootstrap([boot.peer_id for boot in boots])
    prefix = network_prefix("meta-llama/Llama-3.1-8B-Instruct")
    bootstrap = [*(boot.peer_id for boot in boots), peer(99)]
    also = [KwaaiPublisher(view, prefix, lambda: bootstrap, leases=True)]
    reports = []
    announcer = pair.announcer(
        reports=reports, also=also, repository="meta-llama/Llama-3.1-8B-Instruct", cache_tokens=lambda: 100
    )
    announcer.offer.throughput = Throughput(12.5)
    await announcer.announce(ServerState.ONLINE)
    by_network = {report.network: report for report in reports}
    kwaai = by_network["kwaainet"]
    assert kwaai.ok
    assert [kwaai.peers[boot.peer_id] for boot in boots] == [4, 4]
    assert isinstance(kwaai.peers[peer(99)], str)
    assert f"{peer(99).short}: " in kwaai.told_by_peers
    own = str(view.peer_id)
    for boot in boots:
        for key in ("Llama-3-1-8B-Instruct.2", "Llama-3-1-8B-Instruct.3", "_kwaai.inference.nodes"):
            found = await boot.get(key)
            info = NodeInfo.from_value(own, found.value[own].value)
            assert info.usable
            assert (info.peer, info.start_block, info.end_block) == (view.peer_id, 2, 4)
            assert (info.throughput, info.cache_tokens_left, info.leases) == (12.5, 100, True)
            assert found.value[own].expiration == pytest.approx(pair.clock() + 360, abs=2)
        registry = await boot.get("_petals.models")
        assert registry.value["Llama-3-1-8B-Instruct"].value == {
            "repository": "meta-llama/Llama-3.1-8B-Instruct",
            "num_blocks": 8,
        }
        # nothing of the other network
        assert await boot.get("m-hf.2") is None
    assert await pair.reading.get("Llama-3-1-8B-Instruct.2") is None
    assert (await pair.info(2)).state is ServerState.ONLINE

    await announcer.announce(ServerState.OFFLINE)
    for boot in boots:
        found = await boot.get("_kwaai.inference.nodes")
        assert not NodeInfo.from_value(own, found.value[own].value).usable
    assert (await pair.info(2)).state is ServerState.OFFLINE


async def test_records_of_the_same_moment_replace_each_other(pair, autojump_clock):
    announcer = pair.announcer()
    await announcer.announce(ServerState.JOINING)
    (report,) = await announcer.announce(ServerState.ONLINE)
    assert report.ok
    assert (await pair.info(2)).state is ServerState.ONLINE


async def test_a_round_that_a_later_one_overtook_is_not_judged(pair, autojump_clock):
    """Peers refuse its records for the later ones, which does not mean that nobody knows of this node."""
    reports = []
    announcer = pair.announcer(reports=reports)
    store_many, is_first = pair.announcing.store_many, True

    async def slow_at_first(items):
        nonlocal is_first
        if is_first:
            is_first = False
            await trio.sleep(1)
        return await store_many(items)

    pair.announcing.store_many = slow_at_first
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.announce, ServerState.JOINING)
        await trio.testing.wait_all_tasks_blocked()
        await announcer.announce(ServerState.ONLINE)
    assert [report.state for report in reports] == [ServerState.ONLINE]
    assert (await pair.info(2)).state is ServerState.ONLINE


async def test_other_blocks_replace_those_that_are_withdrawn(pair, autojump_clock):
    announcer = pair.announcer()
    announcer.offer.using_relay = True
    await announcer.announce(ServerState.ONLINE)
    with pytest.raises(ValueError, match="must be withdrawn first"):
        announcer.replace(offer())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        await announcer.announce(ServerState.OFFLINE)
        announcer.replace(Offer(range(3, 6), model_blocks=8, repository=None, torch_dtype="float32"))
        await trio.sleep(1.5 * defaults.ANNOUNCE_PERIOD_SECONDS)
        assert [await pair.info(block) for block in (4, 5)] == [None, None]  # nothing is announced by itself
        (report,) = await announcer.announce(ServerState.ONLINE)
        assert (report.records, report.acknowledged) == (4, 4)
        nursery.cancel_scope.cancel()
    assert (await pair.info(2)).state is ServerState.OFFLINE
    for block in (3, 4, 5):
        info = await pair.info(block)
        assert (info.state, info.start_block, info.end_block) == (ServerState.ONLINE, 3, 6)
        assert info.using_relay


async def test_a_round_that_began_earlier_never_wins(pair, autojump_clock):
    announcer = pair.announcer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.announce, ServerState.ONLINE)
        while announcer.wanted is not ServerState.ONLINE:  # its stores have not even begun then
            await trio.lowlevel.checkpoint()
        await announcer.announce(ServerState.OFFLINE)
    assert (await pair.info(2)).state is ServerState.OFFLINE
