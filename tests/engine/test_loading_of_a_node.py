"""A node that fetches its blocks from a hub: what others see of it meanwhile, and what its next start needs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hub_support import WEIGHTS, kept
from local_hub import REPOSITORY, LocalHub

from kwaainet_bridge.config import anchored, parse_config
from kwaainet_bridge.engine import LoadProgress
from kwaainet_bridge.engine.weights.room import remove
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.announcing import AnnounceReport
from kwaainet_bridge.node.daemon import Contact, run_node
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.state import NodeState, Phase

pytestmark = pytest.mark.usefixtures("small_steps")


class Watch:
    """Events for the first announcement and for the beginning of a download."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told, self.fetches = trio.Event(), trio.Event()
        note_announced, note_loading = ModelState.note_announced, ModelState.note_loading

        def announced(state: ModelState, report: AnnounceReport) -> None:
            note_announced(state, report)
            self.told.set()

        def loading(state: ModelState, progress: LoadProgress) -> None:
            note_loading(state, progress)
            if progress.missing_bytes:
                self.fetches.set()

        monkeypatch.setattr(ModelState, "note_announced", announced)
        monkeypatch.setattr(ModelState, "note_loading", loading)


@asynccontextmanager
async def node(folder: Path) -> AsyncIterator[NodeState]:
    """One that serves two blocks of the hub's model; stopped at the end."""
    settings = {
        "identity": {"path": "node.key", "kind": "ed25519"},
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "networks": {"petals": {}},
        "model": {
            "name": REPOSITORY,
            "dht_prefix": "toy",
            "blocks": "1:3",
            "throughput": 1.0,
            "cache_dir": "weights",
            "cache_quota_gib": 1,
        },
    }
    state, stop = NodeState(), trio.Event()

    def started(_contact: Contact) -> None:
        """Nobody waits for it."""

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await run_node(
                anchored(parse_config("", "node", settings), folder), state, stop, on_started=started
            )

        nursery.start_soon(run)
        with trio.fail_after(60):
            yield state
            stop.set()
            await state.wait_for(Phase.STOPPED)


async def test_a_node_joins_while_it_fetches(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    hub.hold = threading.Event()
    try:
        async with node(tmp_path) as state:
            await watch.told.wait()
            await watch.fetches.wait()
            (model,) = state.models.values()
            assert model.announced["petals"].last.state is ServerState.JOINING
            assert model.loading is not None
            assert model.loading.fetched_bytes < model.loading.missing_bytes
            hub.hold.set()
            await state.wait_for(Phase.SERVING)
            assert not remove(kept(tmp_path))  # its configuration says where, and it is in use
    finally:
        hub.hold.set()
    sent = hub.sent[WEIGHTS]
    assert sent < (hub.folder / WEIGHTS).stat().st_size / 2
    async with node(tmp_path) as state:
        await state.wait_for(Phase.SERVING)
    assert hub.sent[WEIGHTS] == sent
    assert remove(kept(tmp_path))
