from __future__ import annotations

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError, PeerUnreachable
from kwaainet_bridge.hivemind.experts.methods import RPC_CHECK
from kwaainet_bridge.hivemind.experts.reachability import ReachabilityService
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.pb.dht_pb2 import NodeInfo, PingRequest
from kwaainet_bridge.wire.peer_id import PeerId


def peer(number):
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


async def ask(probe, about, *, times=1):
    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        ReachabilityService(peer(1), probe).mount(RpcServer(network.host(peer(1))))
        request = PingRequest(peer=NodeInfo(node_id=about))
        client = RpcClient(network.host(peer(2)))
        try:
            for _ in range(times - 1):
                await client.call(peer(1), RPC_CHECK, request, timeout=60)
            return await client.call(peer(1), RPC_CHECK, request, timeout=60)
        finally:
            nursery.cancel_scope.cancel()


async def found(_peer):
    return True


async def lost(_peer):
    raise PeerUnreachable("nobody there", hop="tcp")


async def slow(_peer):
    await trio.sleep(defaults.REACHABILITY_CHECK_SECONDS * 2)


async def test_itself():
    assert (await ask(lost, peer(1).raw)).available


async def test_the_caller():
    assert (await ask(found, peer(2).raw)).available
    assert not (await ask(lost, peer(2).raw)).available


async def test_a_slow_dial_back_is_no(autojump_clock):
    assert not (await ask(slow, peer(2).raw)).available


@pytest.mark.parametrize(
    ("about", "text"), [(peer(3).raw, "itself only"), (b"", "multihash"), (b"x" * 20, "multihash")]
)
async def test_anything_else_is_refused(about, text):
    with pytest.raises(BaseExceptionGroup) as caught:
        await ask(found, about)
    assert caught.group_contains(HandlerError, match=text)


async def test_a_peer_that_asks_without_end_is_refused():
    """Each check is a dial at addresses that it names."""
    assert (await ask(found, peer(2).raw, times=defaults.AUTONAT_DIALS_PER_PEER)).available
    with pytest.raises(BaseExceptionGroup) as caught:
        await ask(found, peer(2).raw, times=defaults.AUTONAT_DIALS_PER_PEER + 1)
    assert caught.group_contains(HandlerError, match="too many checks")
