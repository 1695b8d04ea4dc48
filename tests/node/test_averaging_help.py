"""A node that helps Hivemind runs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
import trio
from node_support import node_config, running_node

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.hivemind.averaging import Averager, State
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.averaging import averaged_tensors
from kwaainet_bridge.wire.peer_id import PeerId

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
RUN = {"prefix": "run", "matchmaking_seconds": 2.0, "target_group_size": 3}


async def averager(
    stack: AsyncExitStack, address: str, value: float, identity: Identity | None = None
) -> Averager:
    peer = await stack.enter_async_context(open_peer([address], listen=LOOPBACK, identity=identity))
    return await stack.enter_async_context(
        Averager(
            peer,
            [torch.full((3000,), value)],
            prefix="run",
            target_group_size=3,
            matchmaking_seconds=2.0,
            part_bytes=1024,
        )
    )


@pytest.mark.slow
async def test_a_node_averages_for_a_run_and_adds_nothing(tmp_path: Path) -> None:
    config = node_config(tmp_path, "helper", averaging={"runs": [RUN | {"part_kib": 1}]})
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(running_node(config))
        await node.serving()
        while "averaging run" not in node.state.degraded:  # nobody is there yet
            await node.state.wait_changed()
        pair = [await averager(stack, node.address, value) for value in (1.0, 5.0)]
        with trio.fail_after(60):
            while "averaging run" in node.state.degraded:
                await node.state.wait_changed()
            results = []
            async with trio.open_nursery() as nursery:

                async def step(peer: Averager) -> None:
                    while True:  # the first group may begin before the node has found it
                        result = await peer.step(gather="mine", timeout=30)
                        if node.contact.peer_id in result.gathered:
                            break
                    results.append(result)

                for peer in pair:
                    nursery.start_soon(step, peer)
        for result in results:
            assert len(result.gathered) == 3
            assert result.missing_elements == 0
        assert pair[0].tensors[0].tolist() == pair[1].tensors[0].tolist() == [3.0] * 3000
        status = node.state.averaging["run"]()
        assert status.rounds >= 1
        assert status.last is not None
        assert set(status.last.gathered) == set(results[0].gathered)
        await node.drained()


async def test_a_node_helps_only_peers_that_it_names(tmp_path: Path) -> None:
    named = Identity.generate("ed25519")
    averaging = {"runs": [RUN | {"part_kib": 1}], "peers": [str(named.peer_id)]}
    config = node_config(tmp_path, "helper", averaging=averaging)
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(running_node(config))
        await node.serving()
        await averager(stack, node.address, 1.0)
        while "averaging run" not in node.state.degraded:
            await node.state.wait_changed()
        assert "run" not in node.state.averaging  # nobody that it may ask shares a state
        await node.drained()


def test_averaged_tensors_are_what_comes_before_the_statistics() -> None:
    statistics = [{"type": "tensor", "index": 0}, {"type": "value", "value": 0.1}, {"type": "tensor"}]
    tensors = [torch.ones(2, 3), torch.ones(4, dtype=torch.float16), torch.ones(5), torch.ones(6)]
    state = State({"optimizer_metadata": statistics}, tensors)
    averaged = averaged_tensors(state, "TrainingStateAverager")
    assert [(tuple(t.shape), t.dtype) for t in averaged] == [
        ((2, 3), torch.float32),
        ((4,), torch.float16),
    ]
    assert not any(t.any() for t in averaged)
    assert len(averaged_tensors(state, "GradientAverager")) == 4


@pytest.mark.parametrize(
    "state",
    [
        State({}, [torch.ones(1)]),
        State({"optimizer_metadata": [{"type": "tensor"}] * 9}, [torch.ones(1)]),
        State({"optimizer_metadata": [1, None]}, [torch.ones(1, dtype=torch.int64)]),
    ],
)
def test_a_state_that_is_no_optimizers_has_nothing_to_average(state: State) -> None:
    assert not averaged_tensors(state, "TrainingStateAverager")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"averaging": {"runs": [{"prefix": "a.b"}]}}, r"averaging\.runs\.0\.prefix"),
        ({"averaging": {"runs": [{"prefix": "a"}, {"prefix": "a"}]}}, "'a' is there twice"),
        ({"averaging": {"runs": [{"prefix": "a", "group_bits": "2"}]}}, "group_bits"),
        ({"averaging": {"peers": ["Qm!"]}}, r"averaging\.peers"),
        ({"averaging": {"runs": [{"prefix": "a"}]}, "listen": []}, "no averager can call this node"),
        ({"averaging": {"runs": [{"prefix": "a"}]}, "networks": {"petals": None}}, "turn networks.petals on"),
    ],
)
def test_mistakes_in_the_configuration_are_named(tmp_path: Path, settings: dict, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        node_config(tmp_path, "helper", **settings)


def test_peer_ids_are_read(tmp_path: Path) -> None:
    peer = str(PeerId(b"\x12\x20" + bytes(32)))
    config = node_config(tmp_path, "helper", averaging={"peers": [peer]})
    assert config.averaging.peers == (peer,)
