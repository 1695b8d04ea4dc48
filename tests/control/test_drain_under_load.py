"""A node that drains while clients of both networks compute: whoever ends in time loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import torch
import trio
from node_clients import BLOCKS, World, node_in_both
from node_support import PREFIX

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError, StreamReset
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.state import Phase
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor

STEPS = 12
BEFORE = 4
"""Steps of each session before the node is told to drain."""
PETALS, KWAAI = 6, 2
"""Sessions of each network."""


class Session:
    """One client's steps, all different from those of others."""

    def __init__(self, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.inputs = [torch.randn(1, 1, 64, generator=drawn) for _ in range(STEPS)]
        self.ids = torch.randint(1, 90, (STEPS,), generator=drawn).tolist()
        self.number = seed
        self.outputs: list[torch.Tensor] = []
        self.begun, self.go_on = trio.Event(), trio.Event()

    async def petals(self, world: World) -> None:
        async with world.petals.session() as call:
            for number, hidden in enumerate(self.inputs):
                await self._at(number)
                await call.send(
                    ExpertRequest(
                        uid=" ".join(f"{PREFIX}.{block}" for block in BLOCKS),
                        tensors=[encode_tensor(hidden), encode_tensor(torch.empty(0))],
                        metadata=msgpack.pack({"max_length": STEPS}),
                    )
                )
                answer = await call.receive(timeout=20)
                self.outputs.append(decode_tensor(answer.tensors[0]))
            await call.send(ExpertRequest())
            await call.end()
            assert [message async for message in call] == []

    async def kwaai(self, world: World) -> None:
        client, peer = world.kwaainet.kwaai, world.kwaainet.node
        for number, token in enumerate(self.ids):
            await self._at(number)
            self.outputs.append(await client.step_ids(peer, self.number, number, [token], timeout=20))

    async def _at(self, number: int) -> None:
        if number == BEFORE:
            self.begun.set()
            await self.go_on.wait()


async def run(world: World, petals: Sequence[Session], kwaai: Sequence[Session], *, drain: bool) -> None:
    async with trio.open_nursery() as nursery:
        for session in petals:
            nursery.start_soon(session.petals, world)
        for session in kwaai:
            nursery.start_soon(session.kwaai, world)
        for session in (*petals, *kwaai):
            await session.begun.wait()
        if drain:
            answer = (await world.admin.post("/api/drain")).json()
            assert answer["sessions"] == len(petals) + len(kwaai)
            await world.node.state.wait_for(Phase.DRAINING)
            async with world.petals.session() as late:
                await late.send(ExpertRequest(uid=f"{PREFIX}.0", metadata=msgpack.pack({"max_length": 4})))
                with pytest.raises(HandlerError, match="shutting down and takes no new sessions"):
                    await late.receive(timeout=10)
        for session in (*petals, *kwaai):
            session.go_on.set()


def sessions() -> tuple[list[Session], list[Session]]:
    return [Session(seed) for seed in range(PETALS)], [Session(seed) for seed in range(50, 50 + KWAAI)]


async def test_sessions_that_end_within_the_deadline_lose_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "KWAAI_DRAIN_IDLE_SECONDS", 1.0)
    async with node_in_both(tmp_path) as world:
        undisturbed, drained = sessions(), sessions()
        await run(world, *undisturbed, drain=False)
        state = world.node.state
        steps_before = counted(status_of(state))
        served = world.node.served
        assert served is not None
        servers = list(served.servers)
        with structlog.testing.capture_logs() as events:
            await run(world, *drained, drain=True)
            with trio.fail_after(30):
                await state.wait_for(Phase.STOPPED)
        assert not [e for e in events if e["event"] == "sessions are cut off"]
        # counts are kept by the servers, which the state has no more
        steps = sum(server.counts.steps for server in servers)
        assert steps - steps_before == (PETALS + KWAAI) * STEPS
        for was, now in zip(undisturbed[0] + undisturbed[1], drained[0] + drained[1], strict=True):
            assert len(now.outputs) == STEPS
            # what is batched with what differs from run to run, and KwaaiNet's values are rounded to float16
            error = torch.cat(now.outputs) - torch.cat(was.outputs)
            assert error.norm() < 1e-3 * torch.cat(was.outputs).norm()


def counted(status: dict[str, Any]) -> int:
    return sum(network["served"]["steps"] for network in status["networks"].values())


async def test_sessions_that_do_not_end_are_cut_off_at_the_deadline(tmp_path: Path) -> None:
    async with node_in_both(tmp_path, drain_seconds=0.5) as world:
        session = Session(1)
        with structlog.testing.capture_logs() as events:
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:

                    async def use() -> None:
                        with pytest.raises((HandlerError, StreamReset)):
                            await session.petals(world)

                    nursery.start_soon(use)
                    await session.begun.wait()
                    world.node.stop.set()
                    await world.node.state.wait_for(Phase.STOPPED)
                    session.go_on.set()
        cut = [e for e in events if e["event"] == "sessions are cut off"]
        assert [(e["sessions"], e["after_seconds"]) for e in cut] == [(1, 0.5)]
    assert len(session.outputs) == BEFORE
