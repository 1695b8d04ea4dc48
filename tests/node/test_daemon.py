"""A node's life, in the test's own process over real sockets."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from node_support import NOWHERE, PREFIX, node_config, running_node

from kwaainet_bridge.config import parse_config
from kwaainet_bridge.errors import CheckpointError, ConfigError, IdentityError
from kwaainet_bridge.hivemind.dht import BootstrapResult, DhtNode
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.node import daemon
from kwaainet_bridge.node.bootstrap import BootstrapWatch
from kwaainet_bridge.node.networks import network_protocols
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.pb.dht_pb2 import NodeInfo, PingRequest
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertUID


class Observer:
    """A client of the swarm that reads its records."""

    def __init__(self, host, dht):
        self.host, self.dht, self.client = host, dht, RpcClient(host)

    async def info(self, block, peer):
        found = await self.dht.get(f"{PREFIX}.{block}")
        entry = found.value.get(str(peer)) if found else None
        return ServerInfo.from_value(entry.value) if entry else None


async def observe(address, use, *, listen=()):
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=listen)) as host:
        dht = DhtNode(host, RpcServer(host), RpcClient(host), client_mode=True)
        async with dht.running():
            await dht.bootstrap([await host.connect(address)])
            await use(Observer(host, dht))


async def test_serves_announces_and_withdraws(tmp_path):
    async with (
        running_node(node_config(tmp_path, "first")) as first,
        running_node(node_config(tmp_path, "second", bootstrap=[first.address], blocks="2:5")) as second,
    ):
        await second.serving()
        peer = second.contact.peer_id

        async def while_serving(observer):
            for block in range(8):
                info = await observer.info(block, peer)
                if block in range(2, 5):
                    assert (info.state, info.start_block, info.end_block) == (ServerState.ONLINE, 2, 5)
                    assert info.cache_tokens_left == 2 * 3 * 16384
                    assert info.torch_dtype == "float32"
                else:
                    assert info is None
            answer = await observer.client.call(
                peer, methods.RPC_INFO, ExpertUID(uid=f"{PREFIX}.2"), timeout=10
            )
            assert answer.serialized_info

        await observe(first.address, while_serving)
        await second.drained()

        async def afterwards(observer):
            info = await observer.info(2, peer)
            assert info.state is ServerState.OFFLINE

        await observe(first.address, afterwards)


async def test_a_cancelled_node_withdraws_its_blocks(tmp_path):
    async with running_node(node_config(tmp_path, "first")) as first:
        config = node_config(tmp_path, "second", bootstrap=[first.address], blocks="2:5")
        async with running_node(config) as second:
            await second.serving()
            peer = second.contact.peer_id

        async def afterwards(observer):
            info = await observer.info(2, peer)
            assert info.state is ServerState.OFFLINE

        await observe(first.address, afterwards)


async def test_node_without_a_model_is_a_bootstrap_peer(tmp_path):
    async with running_node(node_config(tmp_path, "only")) as node:
        await node.serving()

        async def ping(observer):
            assert await observer.dht.ping(node.contact.peer_id) > 0

        await observe(node.address, ping)
        await node.drained()


async def test_unreachable_bootstrap_peers_are_not_fatal(tmp_path):
    config = node_config(tmp_path, "lonely", bootstrap=[NOWHERE], blocks="0:1")
    async with running_node(config) as node:
        await node.serving()
        assert node.state.degraded == {"bootstrap petals": "none of 1 bootstrap peers is reached"}
        await node.drained()


async def test_kwaainet_alone_keeps_in_touch_and_announces_nothing(tmp_path):
    async with running_node(node_config(tmp_path, "peer")) as peer:
        networks = {"petals": None, "kwaainet": {"bootstrap": [peer.address]}}
        async with running_node(node_config(tmp_path, "bridge", networks=networks)) as bridge:
            await bridge.serving()
            assert not bridge.state.degraded
            await bridge.drained()


async def test_bootstrap_peer_with_two_addresses_is_joined_through_once(tmp_path):
    async with running_node(node_config(tmp_path, "first")) as first:
        addresses = [first.address, first.address.replace("/ip4/127.0.0.1/", "/dns4/localhost/")]
        joined = []

        async def join(peers):
            joined.extend(peers)
            return [BootstrapResult(peers[0], 0.01, None)]

        async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
            state = NodeState()
            watch = BootstrapWatch("petals", host, addresses, state, join=join)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.run)
                await watch.first_round()
                await trio.testing.wait_all_tasks_blocked(0.3)  # long enough for the second dial
                assert joined == [first.contact.peer_id]
                await first.drained()
                with trio.fail_after(10):
                    await host.wait_disconnected(first.contact.peer_id)
                    await trio.testing.wait_all_tasks_blocked()
                assert not watch.reached
                nursery.cancel_scope.cancel()
        assert state.degraded


async def test_stop_while_bootstrapping(tmp_path):
    config = node_config(tmp_path, "hasty", bootstrap=[NOWHERE], blocks="0:8")
    async with running_node(config) as node:
        assert node.state.phase is Phase.BOOTSTRAPPING
        await node.drained()


async def test_stop_while_loading(tmp_path):
    async with running_node(node_config(tmp_path, "hasty", blocks="0:8")) as node:
        await node.state.wait_for(Phase.LOADING)
        await node.drained()


async def test_running_session_is_drained_first(tmp_path):
    import torch

    from kwaainet_bridge.wire import msgpack
    from kwaainet_bridge.wire.expert import ExpertRequest
    from kwaainet_bridge.wire.tensors import encode_tensor

    async with running_node(node_config(tmp_path, "node", blocks="0:2")) as node:
        await node.serving()

        async def use(observer):
            step = ExpertRequest(
                uid=f"{PREFIX}.0 {PREFIX}.1",
                tensors=[encode_tensor(torch.zeros(1, 1, 64))],
                metadata=msgpack.pack({"max_length": 8}),
            )
            stream = observer.client.stream(node.contact.peer_id, methods.RPC_INFERENCE, open_timeout=5)
            async with stream as call:
                await call.send(step)
                await call.receive(timeout=10)
                node.stop.set()
                await node.state.wait_for(Phase.DRAINING)
                await call.send(step)
                await call.receive(timeout=10)
                assert node.state.phase is Phase.DRAINING
                await call.send(ExpertRequest())
                await call.end()
                assert [r async for r in call] == []
            with trio.fail_after(10):
                await node.state.wait_for(Phase.STOPPED)

        await observe(node.address, use)


async def test_reachability_of_a_caller_is_checked_by_dialling_it(tmp_path):
    async with running_node(node_config(tmp_path, "checker")) as checker:
        await checker.serving()

        async def ask(observer):
            own = observer.host.peer_id
            if observer.host.addresses():
                from kwaainet_bridge.hivemind.experts.reachability import ReachabilityService

                ReachabilityService(own, None).mount(RpcServer(observer.host))
            answer = await observer.client.call(
                checker.contact.peer_id,
                methods.RPC_CHECK,
                PingRequest(peer=NodeInfo(node_id=own.raw)),
                timeout=10,
            )
            assert answer.available is bool(observer.host.addresses())

        await observe(checker.address, ask, listen=("/ip4/127.0.0.1/tcp/0",))
        await observe(checker.address, ask)


async def refused(config, error):
    async def run():
        async with running_node(config) as node:
            await node.serving()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    leaves = caught.value
    while isinstance(leaves, BaseExceptionGroup):
        leaves = leaves.exceptions[0]
    assert isinstance(leaves, error), leaves
    return str(leaves)


async def test_one_identity_one_node(tmp_path):
    async with running_node(node_config(tmp_path, "same")):
        text = await refused(node_config(tmp_path, "same"), IdentityError)
    assert "same.key" in text


async def test_identity_that_others_can_read(tmp_path):
    config = node_config(tmp_path, "open")
    Identity.generate("ed25519")
    async with running_node(config) as node:
        await node.drained()
    config.identity.path.chmod(0o644)
    assert "chmod 600" in await refused(config, IdentityError)


async def test_port_in_use(tmp_path):
    async with running_node(node_config(tmp_path, "one")) as one:
        taken = one.address.partition("/p2p/")[0]
        text = await refused(node_config(tmp_path, "two", listen=[taken]), ConfigError)
    assert taken in text


async def test_blocks_that_the_model_does_not_have(tmp_path):
    text = await refused(node_config(tmp_path, "many", blocks="4:9"), ConfigError)
    assert "4:9" in text
    assert "8" in text


async def test_folder_without_a_model(tmp_path):
    config = node_config(tmp_path, "empty", model={"name": str(tmp_path), "dht_prefix": "x"})
    assert str(tmp_path) in await refused(config, CheckpointError)


def test_limits_of_the_configuration_reach_the_host(monkeypatch):
    monkeypatch.setattr(daemon, "affordable_connections", lambda connections: connections)
    text = """
    limits:
      connections: 90
      connections_high: 50
      connections_low: 40
      connections_per_address: 5
      connections_per_network: {petals: 60}
      strangers: 7
      streams: 300
      streams_per_peer: 30
      stream_buffers_mib: 7
    """
    limits = daemon._limits(parse_config(text, "x").limits)
    assert limits == Limits(
        90, 50, 40, 5, 7, {"petals": 60}, streams=300, streams_per_peer=30, buffer_bytes=7 << 20
    )
    assert daemon._limits(parse_config("", "x").limits) == Limits()


@pytest.mark.parametrize(
    ("kademlia", "served"),
    [
        ({}, {"/ipfs/kad/1.0.0"}),
        ({"protocol": "/kwaai/kad/1.0.0"}, {"/kwaai/kad/1.0.0"}),
        ({"mode": "client"}, set()),
    ],
)
async def test_which_kademlia_is_served(tmp_path, kademlia, served):
    config = node_config(tmp_path, "node", kademlia=kademlia)
    async with running_node(config) as node, open_host(HostConfig(Identity.generate("ed25519"))) as host:
        peer = await host.connect(node.address)
        await host.wait_identified()
        assert {p for p in host.description(peer).protocols if "kad" in p} == served


def test_the_networks_of_the_configuration_tell_strangers_apart():
    both = parse_config("networks: {petals: {}, kwaainet: {}}", "x").networks
    assert network_protocols(both)["kwaainet"] == ("/kwaai/",)
    assert "DHTProtocol." in network_protocols(both)["petals"]
    assert list(network_protocols(both)) == ["kwaainet", "petals"]
    assert list(network_protocols(parse_config("", "x").networks)) == ["petals"]
    assert network_protocols(parse_config("networks: {petals: null}", "x").networks) == {}
