"""``kwaainet-bridge run``: a node under signals."""

from __future__ import annotations

import os
import signal

import trio
import typer

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.node.daemon import Contact, run_node
from kwaainet_bridge.node.logs import configure_logging
from kwaainet_bridge.node.state import NodeState

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def run_until_signalled(config: NodeConfig) -> None:
    """Run a node; the first SIGTERM or SIGINT drains it, the second ends the process at once."""
    configure_logging(config.log.level, config.log.format)
    stop = trio.Event()
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, stop)
            await run_node(config, NodeState(), stop, on_started=_introduce)
            nursery.cancel_scope.cancel()


async def _obey(signals: object, stop: trio.Event) -> None:
    async for number in signals:  # type: ignore[attr-defined]  # an async iterator without a public type
        if stop.is_set():
            # no cleanup: whoever asks twice wants it gone, and a stuck computation must not prevent that
            os._exit(128 + number)
        typer.echo("draining; once more to stop at once", err=True)
        stop.set()


def _introduce(contact: Contact) -> None:
    typer.echo(f"peer id    {contact.peer_id}")
    for address in contact.addresses:
        typer.echo(f"address    {address}")
    if contact.join_address is not None:
        typer.echo(f"join with  kwaainet-bridge run --initial-peers {contact.join_address}")
