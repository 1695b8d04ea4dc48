"""What a service manager is told: systemd's protocol of notifications, sd_notify(3).

It is a datagram for each word, to the socket that the manager names in the environment. Without one nothing is told.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.node.readiness import ENGINE
from kwaainet_bridge.node.state import NodeState, Phase

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG: Final = "WATCHDOG_USEC"
_WATCHDOG_OF: Final = "WATCHDOG_PID"
_MICROSECONDS: Final = 1_000_000


async def tell_supervisor(
    state: NodeState,
    stop: trio.Event,
    *,
    environ: Mapping[str, str] = os.environ,
    pid: int | None = None,
    monotonic_ns: Callable[[], int] = time.monotonic_ns,
) -> None:
    """Tell the service manager how the node is, until cancelled; return at once where there is none to be told.

    READY once the node serves, or listens if it has no blocks to serve. While it starts and while it drains, that the
    manager should wait on: a download takes hours, and how long sessions may go on is for the configuration to say.
    RELOADING while the configuration is read anew.
    The watchdog hears of it while the event loop turns and the engine computes; then it need not be restarted.
    A manager that cannot be told is logged, and costs the node nothing.
    """
    name = environ.get(_SOCKET)
    if not name:
        return
    if name[0] not in "/@":
        log.warning(
            "service manager not told", reason=f"{_SOCKET} is neither a path nor abstract: {name!r:.100}"
        )
        return
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as sock:
        manager = _Manager(sock, f"\0{name[1:]}" if name[0] == "@" else name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell_status, manager, state)
            nursery.start_soon(_tell_ready, manager, state, monotonic_ns)
            nursery.start_soon(_tell_stopping, manager, stop)
            nursery.start_soon(_ask_to_wait, manager, state, stop)
            watchdog = _watchdog_seconds(environ, os.getpid() if pid is None else pid)
            if watchdog is not None:
                nursery.start_soon(_feed_watchdog, manager, state, watchdog / 2)


class _Manager:
    """Who is told. Each failure is logged once, until telling succeeds again."""

    def __init__(self, sock: trio.socket.SocketType, address: str) -> None:
        self._sock = sock
        self._address = address
        self._failure: str | None = None

    async def tell(self, **words: str) -> None:
        message = "\n".join(f"{word}={value}" for word, value in words.items())
        try:
            await self._sock.sendto(message.encode(), self._address)
        except OSError as e:
            if str(e) != self._failure:
                self._failure = str(e)
                log.warning(
                    "service manager not told", address=self._address, word=next(iter(words)), reason=str(e)
                )
        else:
            self._failure = None


def _watchdog_seconds(environ: Mapping[str, str], pid: int) -> float | None:
    """How long the manager waits for a sign of life of this process; None if it does not."""
    text, of = environ.get(_WATCHDOG), environ.get(_WATCHDOG_OF)
    if text is None or (of is not None and of != str(pid)):
        return None
    try:
        seconds = int(text) / _MICROSECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        log.warning("watchdog not told", reason=f"{_WATCHDOG} is no time in microseconds: {text!r:.100}")
        return None
    return seconds


def _is_up(state: NodeState) -> bool:
    if state.phase in (Phase.SERVING, Phase.PAUSED):
        return True
    # its networks are still being joined, but who wants to join through it can
    return state.phase is Phase.BOOTSTRAPPING and not state.announces


def _is_working(state: NodeState) -> bool:
    """Whether some model's engine computes, if there are any: what helps one would end the sessions of the others."""
    return not state.models or any(ENGINE not in model.degraded for model in state.models.values())


async def _tell_ready(manager: _Manager, state: NodeState, monotonic_ns: Callable[[], int]) -> None:
    while not _is_up(state):
        await state.wait_changed()
    # a reload until then was part of the start
    begun, ended = state.reloads_begun, state.reloads_ended
    await manager.tell(READY="1")
    while True:
        if state.reloads_begun > begun:
            begun += 1
            await manager.tell(RELOADING="1", MONOTONIC_USEC=str(monotonic_ns() // 1000))
        elif state.reloads_ended > ended:
            ended += 1
            await manager.tell(READY="1")
        else:
            await state.wait_changed()


async def _tell_stopping(manager: _Manager, stop: trio.Event) -> None:
    await stop.wait()
    await manager.tell(STOPPING="1")


async def _tell_status(manager: _Manager, state: NodeState) -> None:
    told = None
    while True:
        status = "; ".join(_status(state))
        if status != told:
            told = status
            await manager.tell(STATUS=status)
            continue  # the state may have changed meanwhile
        await state.wait_changed()


def _status(state: NodeState) -> Iterator[str]:
    """One line. Names of conditions only: a reason may hold what a peer said."""
    blocks = state.facts.get("blocks")
    yield state.phase.value if blocks is None else f"{state.phase.value} blocks {blocks}"
    degraded = [
        condition if model is None or len(state.models) == 1 else f"{condition} of {model.key}"
        for model, condition, _ in state.degradations()
    ]
    if degraded:
        yield f"degraded: {', '.join(degraded)}"


async def _ask_to_wait(manager: _Manager, state: NodeState, stop: trio.Event) -> None:
    """Asked over and over, and by the event loop: a start or a drain that hangs is ended."""
    microseconds = str(int(defaults.SUPERVISOR_PATIENCE_SECONDS * _MICROSECONDS))
    while True:
        if stop.is_set() or not _is_up(state):
            if _is_working(state):
                await manager.tell(EXTEND_TIMEOUT_USEC=microseconds)
            await trio.sleep(defaults.SUPERVISOR_PATIENCE_SECONDS / 3)
        else:
            await stop.wait()


async def _feed_watchdog(manager: _Manager, state: NodeState, period: float) -> None:
    while True:
        if _is_working(state):
            await manager.tell(WATCHDOG="1")
        await trio.sleep(period)
