"""An operator who asks at an awkward moment: while blocks are about to be served, move, or leave."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
from node_support import node_config, running_node
from placement_fakes import A, span
from test_pausing import PausedWorld
from trio.testing import MockClock, wait_all_tasks_blocked

from kwaainet_bridge.config import IdleConfig
from kwaainet_bridge.errors import CapacityDenied
from kwaainet_bridge.kwaai.mux_client import open_mux
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.idle import IDLE, IdleWatch
from kwaainet_bridge.node.phase import Phase
from kwaainet_bridge.node.state import NodeState


async def test_blocks_that_are_about_to_be_announced_are_paused_at_once(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    settling, settled = trio.Event(), trio.Event()
    settles = 0

    async def settle() -> None:
        nonlocal settles
        settles += 1
        if settles == 2:  # the first is of the records that say JOINING
            settling.set()
            await settled.wait()

    world.reachability.settle = settle  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await settling.wait()
        server = world.petals.server
        assert server is not None
        assert not server.paused
        world.pausing.ask("operator", "paused")
        await wait_all_tasks_blocked()
        assert server.paused
        world.pausing.lift()
        await wait_all_tasks_blocked()
        assert not server.paused
        settled.set()
        await world.state.wait_for(Phase.SERVING)
        assert not server.paused
        world.stop.set()


async def test_sessions_end_now_also_where_blocks_are_about_to_move(autojump_clock: MockClock) -> None:
    world = PausedWorld(blocks="auto", num_blocks=4)
    async with world.running():
        server = world.petals.server
        assert server is not None
        server.begin_sessions(2)
        for network in world.networks:
            network.others = [span(0, 4, A)]
        await world.state.wait_for(Phase.DRAINING)
        assert server.open_sessions == 2
        began = trio.current_time()
        world.pausing.ask("operator", "paused", end_sessions=True)
        await wait_all_tasks_blocked()
        assert server.open_sessions == 0
        await world.paused()
        assert trio.current_time() - began < 10
        world.pausing.lift()
        await world.state.wait_for(Phase.SERVING)


async def test_a_node_that_is_stopped_while_its_records_are_being_withdrawn_withdraws_them(
    autojump_clock: MockClock,
) -> None:
    world = PausedWorld()
    stored: list[str] = []
    for network in world.networks:

        async def store(items: object, network=network) -> list[object]:
            state, _ = network.rounds[-1]
            await trio.sleep(5)
            stored.append(f"{network.name} {state}")
            return []

        network.store = store  # type: ignore[assignment, method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await world.state.wait_for(Phase.SERVING)
        world.pausing.ask("operator", "paused")
        await world.paused()
        stored.clear()
        world.stop.set()
    assert {"petals OFFLINE", "kwaainet OFFLINE"} <= set(stored)


async def test_a_pause_while_the_node_leaves_its_blocks_keeps_it_from_no_others(
    autojump_clock: MockClock,
) -> None:
    world = PausedWorld(blocks="auto", num_blocks=4)
    async with world.running():
        for network in world.networks:
            network.others = [span(0, 4, A)]
        await world.state.wait_for(Phase.DRAINING)
        await trio.sleep(0.05)  # half of what it takes to tell a network
        world.pausing.ask("operator", "paused")
        await world.paused()
        assert world.blocks == range(4, 8)
        world.pausing.lift()
        await world.state.wait_for(Phase.SERVING)


# --- the idle rule

RULE = IdleConfig(watch="cpu", pause_above=20, pause_seconds=0, resume_below=10, resume_seconds=60)


async def test_a_driver_that_never_answers_does_not_keep_the_node_from_ending() -> None:
    asked, answers = threading.Event(), threading.Event()

    def read() -> float:
        asked.set()
        answers.wait(30)
        return 0.0

    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(IdleWatch(RULE, read, NodeState()).run)
                await trio.to_thread.run_sync(asked.wait)
                nursery.cancel_scope.cancel()
        assert not answers.is_set()
    finally:
        answers.set()


async def test_processes_that_may_not_be_looked_at_do_not_end_the_node(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    import psutil

    from kwaainet_bridge.node.use_of_cpu import CpuReader

    state, reader = NodeState(), CpuReader()

    def denied(*_: object, **__: object) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "children", denied)
    nursery.start_soon(IdleWatch(RULE, reader, state).run)
    with trio.fail_after(10):
        while IDLE not in state.degraded:
            await state.wait_changed()


async def test_another_rule_is_followed_at_once_though_a_driver_does_not_answer(
    nursery: trio.Nursery,
) -> None:
    asked, answers = threading.Event(), threading.Event()

    def hangs() -> float:
        asked.set()
        answers.wait(30)
        return 0.0

    state = NodeState()
    watch = IdleWatch(RULE, hangs, state)
    nursery.start_soon(watch.run)
    try:
        await trio.to_thread.run_sync(asked.wait)
        watch.follow(RULE, lambda: 100.0)
        with trio.fail_after(10):
            await state.pausing.wait_until(asked=True)
    finally:
        answers.set()


# --- what needs no blocks


async def test_a_paused_node_without_blocks_passes_nobody_on_to_its_local_endpoint(tmp_path: Path) -> None:
    """KwaaiNet's peers may use another server of its owner's through the node."""
    async with running_node(node_config(tmp_path, "first")) as first:
        config = node_config(
            tmp_path,
            "node",
            networks={"petals": None, "kwaainet": {"bootstrap": [first.address]}},
            protocols={"kwaai_mux": {"endpoint": "http://127.0.0.1:1", "paths": ["/v1/*"]}},
        )
        async with (
            running_node(config) as node,
            open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host,
        ):
            await node.serving()
            peer = await host.connect(node.address)
            async with open_mux(host, peer, open_timeout=5) as mux:
                assert (await mux.lease(timeout=5)).lease_id
                assert (await mux.request("POST", "/v1/chat/completions", timeout=5))[0] == 502
                node.state.pausing.ask("operator", "paused")
                await node.state.wait_for(Phase.PAUSED)
                with pytest.raises(CapacityDenied):
                    await mux.lease(timeout=5)
                assert (await mux.request("POST", "/v1/chat/completions", timeout=5))[0] == 503
                node.state.pausing.lift()
                await node.serving()
                assert (await mux.lease(timeout=5)).lease_id
