"""Nodes inside the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from kwaainet_bridge.config import NodeConfig, anchored, parse_config
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.daemon import Contact, run_node
from kwaainet_bridge.node.node_models import NodeModels
from kwaainet_bridge.node.served import ServedBlocks
from kwaainet_bridge.node.state import NodeState, Phase

TINY = Path(__file__).parent.parent / "vectors" / "petals-tiny-llama" / "model"
PREFIX = "tiny-llama-hf"
NOWHERE = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJNHmzNXJwHBrjUin2kpjTMSyogJjT8oTH2T3TPKEhjAA"


def node_config(folder: Path, name: str, *, bootstrap=(), blocks=None, **more) -> NodeConfig:
    settings = {
        "identity": {"path": f"{name}.key", "kind": "ed25519"},
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "networks": {"petals": {"bootstrap": list(bootstrap)}},
        **more,
    }
    if blocks is not None:
        settings["model"] = {
            "name": str(TINY),
            "dht_prefix": PREFIX,
            "blocks": blocks,
            "throughput": 1.0,
            "threads": 1,
        }
    return anchored(parse_config("", name, settings), folder)


@dataclass
class RunningNode:
    state: NodeState
    stop: trio.Event
    contact: Contact
    models: NodeModels
    config: NodeConfig

    @property
    def served(self) -> ServedBlocks | None:
        """The blocks of the only model, or of the first."""
        return next(iter(self.state.models.values())).served

    @property
    def address(self) -> str:
        assert self.contact.join_address is not None
        return self.contact.join_address

    async def serving(self) -> None:
        with trio.fail_after(60):
            await self.state.wait_for(Phase.SERVING)

    async def drained(self) -> None:
        self.stop.set()
        with trio.fail_after(60):
            await self.state.wait_for(Phase.STOPPED)


@asynccontextmanager
async def running_node(
    config: NodeConfig, *, read: Callable[[], NodeConfig] | None = None
) -> AsyncIterator[RunningNode]:
    """A node that has started; cancelled at the end of the block if it still runs. ``read`` is what it reloads."""
    state, stop, started = NodeState(), trio.Event(), trio.Event()
    contacts, models = [], []

    def on_models(made: NodeModels) -> None:
        models.append(made)
        started.set()

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            control = Control(config, state, stop, read=read)
            await run_node(
                config, state, stop, on_started=contacts.append, on_models=on_models, control=control
            )

        nursery.start_soon(run)
        await started.wait()
        yield RunningNode(state, stop, contacts[0], models[0], config)
        nursery.cancel_scope.cancel()
