"""``kwaainet-bridge run``: a node under signals.

What it prints on standard output is for people and for programs that start nodes: one fact a line, its label
first. The log goes to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Final

import structlog
import trio
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig, NodeConfig
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.control import Control, Stopping
from kwaainet_bridge.node.daemon import Contact, run_node
from kwaainet_bridge.node.logs import configure_logging, log_ring
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.supervision import tell_supervisor

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

HANGUP: Final[signal.Signals | None] = getattr(signal, "SIGHUP", None)
"""None on Windows."""

PEER_LABEL: Final = "peer id"
ADDRESS_LABEL: Final = "address"
JOIN_LABEL: Final = "join with"
SERVING_LABEL: Final = "serving"
REACHABLE_LABEL: Final = "reachable"

_UNCOLLECTED_SECONDS = (
    60.0  # a start takes some seconds; one that fetches a model must not gather garbage for long
)


async def run_until_signalled(config: NodeConfig, *, read: Callable[[], NodeConfig] | None = None) -> None:
    """Run a node; the first SIGTERM or SIGINT drains it, the second ends the process at once.

    SIGHUP has the configuration read anew by ``read``, unless it tells that the terminal is gone, which drains as well.
    Leaves the garbage collector switched on, whether it was or not.
    """
    stop = trio.Event()
    state = NodeState()
    state.logs = log_ring(config)
    configure_logging(config.log.level, config.log.format, ring=state.logs)
    control = Control(config, state, stop, read=read)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *_hangup()) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(_obey, signals, control, has_terminal=_has_terminal()))
            nursery.start_soon(tell_supervisor, state, stop)
            nursery.start_soon(_tell_when_serving, state)
            nursery.start_soon(_tell_reachability, state)
            nursery.start_soon(_show_loading, state)
            nursery.start_soon(_collect_garbage_once_started, state)
            introduce = partial(_introduce, config.served_models)
            await run_node(config, state, stop, on_started=introduce, control=control)
            nursery.cancel_scope.cancel()


def _hangup() -> list[signal.Signals]:
    """SIGHUP where there is one, and where whoever has started this process has not told it to ignore it (nohup)."""
    return [] if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [HANGUP]


def _has_terminal() -> bool:
    if not hasattr(os, "O_NOCTTY"):  # Windows
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _obey(signals: AsyncIterator[int], control: Control, *, has_terminal: bool) -> None:
    asked, waits = False, False
    reloading = trio.Lock()

    async def reload() -> None:
        nonlocal waits
        async with reloading:
            waits = False
            await _reload(control)

    async with trio.open_nursery() as nursery:
        async for number in signals:
            if number == HANGUP and (not has_terminal or _has_terminal()):
                if not waits:  # one that has not begun yet reads what the file is then
                    waits = True
                    nursery.start_soon(reload)
                continue
            if asked:
                # no cleanup: whoever asks twice wants it gone, and a stuck computation must not prevent that
                os._exit(128 + number)
            asked = True
            _say("draining; once more to stop at once", err=True)
            control.drain()


async def _reload(control: Control) -> None:
    try:
        await control.reload()
    except (ConfigError, Stopping) as e:
        _say(f"not reloaded: {e}", err=True)
    except Exception:  # whatever is wrong with reading it, the node goes on as it was
        log.exception("configuration not reloaded")


def _say(text: str, *, err: bool = False) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        typer.echo(text, err=err)


async def _collect_garbage_once_started(state: NodeState) -> None:
    """Switch the collector on, and spare it what the start has made: that stays, and walking it takes 0.3 s."""
    try:
        with trio.move_on_after(_UNCOLLECTED_SECONDS):
            await state.wait_for(Phase.SERVING)
    finally:
        gc.freeze()
        gc.enable()


def _introduce(models: Sequence[ModelConfig], contact: Contact) -> None:
    typer.echo(f"{PEER_LABEL}    {contact.peer_id}")
    for address in contact.addresses:
        typer.echo(f"{ADDRESS_LABEL}    {address}")
    if contact.join_address is not None:
        for model in models:
            typer.echo(f"{JOIN_LABEL}  {join_command(model, contact.join_address)}")
        if not models:
            typer.echo(f"{JOIN_LABEL}  {join_command(None, contact.join_address)}")


def join_command(model: ModelConfig | None, address: str) -> str:
    """What another machine runs to join: with this node's model, all blocks of it, if this node serves one."""
    words = ["kwaainet-bridge", "run"]
    if model is not None:
        words += ["--model", model.name]
        if model.dht_prefix is not None:
            words += ["--dht-prefix", model.dht_prefix]
    return shlex.join([*words, "--initial-peers", address])


async def _tell_when_serving(state: NodeState) -> None:
    """Each model, once it serves for the first time, or that there are none."""
    await state.wait_for(Phase.SERVING)
    if not state.models:
        _say(f"{SERVING_LABEL}    no blocks")
    told: set[str] = set()
    while True:
        for model in state.models.values():
            if model.phase is Phase.SERVING and model.key not in told:
                told.add(model.key)
                facts = model.facts
                _say(f"{SERVING_LABEL}    {facts['prefix']} {facts['blocks']} of {facts['model_blocks']}")
        await state.wait_changed()


async def _show_loading(state: NodeState, console: Console | None = None) -> None:
    """A bar on a terminal for as long as weights are fetched and read."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.suppress(OSError), Progress(*columns, console=console, transient=True) as bar:
        fetching = bar.add_task("fetching", visible=False, total=None)
        reading = bar.add_task("reading", visible=False, total=None)
        while state.phase in (Phase.STARTING, Phase.BOOTSTRAPPING, Phase.LOADING):
            coming = [m.loading for m in state.models.values() if m.served is None]
            if (now := next(filter(None, coming), None)) is not None:
                if now.missing_bytes:
                    bar.update(fetching, visible=True, completed=now.fetched_bytes, total=now.missing_bytes)
                else:
                    bar.update(fetching, visible=False)
                    bar.update(reading, visible=True, completed=now.bytes_done, total=now.bytes_total)
            await trio.sleep(defaults.DOWNLOAD_TELL_SECONDS)


async def _tell_reachability(state: NodeState) -> None:
    told, _ = state.reachability
    while True:
        await state.wait_changed()
        verdict, evidence = state.reachability
        if verdict is not told:
            told = verdict
            _say(f"{REACHABLE_LABEL}  {verdict.value}: {evidence}")
