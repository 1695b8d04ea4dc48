"""/kwaai/avg/1.0.0 between real hosts that meet through a KwaaiNet bootstrap peer, and a node that is in both networks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from node_support import RunningNode, node_config, running_node
from simulator import key_id, simulated_bootstrap

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.hivemind.averaging import Averager, StepResult
from kwaainet_bridge.hivemind.peer import open_peer

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
NAME = "/kwaai/avg/1.0.0/run"


async def averager(
    stack: AsyncExitStack, addresses: Sequence[str], value: float, protocol: Any = "kwaai", size: int = 3
) -> Averager:
    peer = await stack.enter_async_context(
        open_peer(addresses, listen=LOOPBACK, records_at_initial=protocol == "kwaai")
    )
    return await stack.enter_async_context(
        Averager(
            peer,
            [torch.full((3000,), value)],
            prefix="run",
            protocol=protocol,
            target_group_size=size,
            matchmaking_seconds=2.0,
            request_seconds=1.0,
            part_bytes=1024,
        )
    )


async def step_together(averagers: Sequence[Averager], **options: Any) -> list[StepResult]:
    results: list[StepResult] = []

    async def step(each: Averager) -> None:
        results.append(await each.step(timeout=30, **options))

    async with trio.open_nursery() as nursery:
        for each in averagers:
            nursery.start_soon(step, each)
    return results


async def test_two_hosts_meet_through_a_bootstrap_peer() -> None:
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        pair = [await averager(stack, [boot.address], value, size=2) for value in (1.0, 5.0)]
        for mean in (3.0, 4.0):
            results = await step_together(pair, gather="mine")
            assert all(list(result.gathered.values()) == ["mine", "mine"] for result in results)
            assert all(result.missing_elements == 0 for result in results)
            assert [each.tensors[0].tolist() for each in pair] == [[mean] * 3000] * 2
            pair[0].tensors[0].fill_(5.0)
        state = await pair[0].load_state_from_peers()
        assert state is not None
        assert state.tensors[0].tolist() == [4.0] * 3000
        assert boot.dht.held.find(key_id(f"{NAME}.0b"))
        assert not boot.dht.held.find(key_id("run.0b"))
        assert boot.complaints == []


async def test_records_are_asked_of_bootstrap_peers_alone() -> None:
    """A peer that serves the DHT's calls, as every KwaaiNet node does, is not taken for one that keeps records."""
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        keeper = await stack.enter_async_context(open_peer([boot.address], listen=LOOPBACK))
        pair = [await averager(stack, [boot.address], value, size=2) for value in (1.0, 5.0)]
        for each in pair:
            await each._peer.dht.bootstrap([keeper.peer_id])
            assert [str(contact.peer) for contact in each._peer.dht.neighbours()] == [boot.peer_id]
        await step_together(pair)
        assert await keeper.dht.get(f"{NAME}.0b") is not None  # by way of the bootstrap peer
        assert not keeper.dht._storage.get(keeper.dht.node_id.of(f"{NAME}.0b"), now=0.0)


async def helped(node: RunningNode, trainers: Sequence[Averager]) -> list[StepResult]:
    """Steps until the node was in a group of them."""
    while True:  # the first group may begin before the node has found it
        results = await step_together(trainers)
        if all(node.contact.peer_id in result.gathered for result in results):
            return results


@pytest.mark.slow
async def test_a_node_in_both_networks_helps_a_run_of_one_prefix_in_each_and_mixes_nothing(
    tmp_path: Path,
) -> None:
    run = {"prefix": "run", "matchmaking_seconds": 2.0, "target_group_size": 3, "part_kib": 1}
    async with AsyncExitStack() as stack:
        boot = await stack.enter_async_context(simulated_bootstrap())
        config = node_config(
            tmp_path,
            "both",
            networks={"petals": {}, "kwaainet": {"bootstrap": [boot.address]}},
            averaging={"runs": [run, run | {"network": "kwaainet"}]},
        )
        node = await stack.enter_async_context(running_node(config))
        await node.serving()
        ours = [await averager(stack, [boot.address], value) for value in (1.0, 5.0)]
        theirs = [await averager(stack, [node.address], value, "hivemind") for value in (10.0, 20.0)]
        results: dict[str, list[StepResult]] = {}

        async def help_in(network: str, trainers: Sequence[Averager]) -> None:
            results[network] = await helped(node, trainers)

        with trio.fail_after(100):
            while not {"run", "run (kwaainet)"} <= set(node.state.averaging):
                await node.state.wait_changed()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(help_in, "kwaainet", ours)
                nursery.start_soon(help_in, "petals", theirs)
        for network, trainers, mean in (("kwaainet", ours, 3.0), ("petals", theirs, 15.0)):
            members = {*(each.peer_id for each in trainers), node.contact.peer_id}
            for result in results[network]:
                assert set(result.gathered) == members
                assert result.missing_elements == 0
            assert [each.tensors[0].tolist() for each in trainers] == [[mean] * 3000] * 2
        # neither network holds anything of the other
        assert boot.dht.held.find(key_id(f"{NAME}.all_averagers"))
        assert not boot.dht.held.find(key_id("run.all_averagers"))
        reader = theirs[0]._peer.dht
        assert await reader.get("run.all_averagers") is not None
        assert await reader.get(f"{NAME}.all_averagers") is None
        assert boot.complaints == []
        await node.drained()


@pytest.mark.parametrize(
    ("run", "networks", "error"),
    [
        ({}, {"petals": {}}, r"'run'.*turn networks\.kwaainet on"),
        ({"prefix": "a/b"}, {"kwaainet": {}}, r"averaging\.runs\.0: .*must be 1 to 64 letters"),
        ({"kind": "GradientAverager"}, {"kwaainet": {}}, "of Hivemind's runs alone"),
        ({"network": "hivemind"}, {"kwaainet": {}}, r"averaging\.runs\.0\.network"),
    ],
)
def test_runs_that_kwaainet_cannot_have_are_named(
    tmp_path: Path, run: dict[str, Any], networks: dict[str, Any], error: str
) -> None:
    runs = [{"network": "kwaainet", "prefix": "run"} | run]
    with pytest.raises(ConfigError, match=error):
        node_config(tmp_path, "helper", networks=networks, averaging={"runs": runs})


def test_one_prefix_may_be_in_both_networks_once(tmp_path: Path) -> None:
    runs = [{"prefix": "run"}, {"prefix": "run", "network": "kwaainet"}]
    config = node_config(tmp_path, "helper", networks={"kwaainet": {}}, averaging={"runs": runs})
    assert [run.name for run in config.averaging.runs] == ["run", "run (kwaainet)"]
    with pytest.raises(ConfigError, match=r"'run \(kwaainet\)' is there twice"):
        node_config(tmp_path, "x", networks={"kwaainet": {}}, averaging={"runs": [*runs, runs[1]]})
