"""``kwaainet-bridge run``: a node under signals.

What it prints on standard output is for people and for programs that start nodes: one fact a line, its label
first. The log goes to standard error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Final

import trio
import typer

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.node.daemon import Contact, run_node
from kwaainet_bridge.node.logs import configure_logging
from kwaainet_bridge.node.state import NodeState, Phase

PEER_LABEL: Final = "peer id"
ADDRESS_LABEL: Final = "address"
JOIN_LABEL: Final = "join with"
SERVING_LABEL: Final = "serving"


async def run_until_signalled(config: NodeConfig) -> None:
    """Run a node; the first SIGTERM or SIGINT drains it, the second ends the process at once."""
    configure_logging(config.log.level, config.log.format)
    stop = trio.Event()
    state = NodeState()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, stop)
            nursery.start_soon(_tell_when_serving, state)
            await run_node(config, state, stop, on_started=_introduce)
            nursery.cancel_scope.cancel()


async def _obey(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for number in signals:
        if stop.is_set():
            # no cleanup: whoever asks twice wants it gone, and a stuck computation must not prevent that
            os._exit(128 + number)
        typer.echo("draining; once more to stop at once", err=True)
        stop.set()


def _introduce(contact: Contact) -> None:
    typer.echo(f"{PEER_LABEL}    {contact.peer_id}")
    for address in contact.addresses:
        typer.echo(f"{ADDRESS_LABEL}    {address}")
    if contact.join_address is not None:
        typer.echo(f"{JOIN_LABEL}  kwaainet-bridge run --initial-peers {contact.join_address}")


async def _tell_when_serving(state: NodeState) -> None:
    await state.wait_for(Phase.SERVING)
    facts = state.facts
    typer.echo(f"{SERVING_LABEL}    " + (f"{facts['prefix']} {facts['blocks']}" if facts else "no blocks"))
