"""A node that takes no work for now: who has asked for that, and what a model does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from kwaainet_bridge.node.phase import Phase

if TYPE_CHECKING:
    from kwaainet_bridge.node.model_state import ModelState
    from kwaainet_bridge.node.served import BlockServer, ServedBlocks


class Pausing:
    """Whether the node takes work: not while anybody asks it to pause, each for a reason of their own."""

    def __init__(self) -> None:
        self.ends_sessions = False
        """Whether sessions that run are to end now."""
        self._reasons: dict[str, str] = {}
        self._changed = trio.Event()

    @property
    def reason(self) -> str | None:
        """Why no work is taken; None while it is."""
        return "; ".join(self._reasons.values()) or None

    @property
    def asked(self) -> bool:
        return bool(self._reasons)

    def ask(self, who: str, reason: str, *, end_sessions: bool = False) -> None:
        """Pause until ``who`` lifts it."""
        self._reasons[who] = reason
        self.ends_sessions |= end_sessions
        self._notify()

    def lift(self, who: str | None = None) -> None:
        """Take back what ``who`` has asked for, None: what anybody has. The node resumes once nobody asks any more."""
        if who is None:
            self._reasons.clear()
        else:
            self._reasons.pop(who, None)
        self.ends_sessions &= self.asked
        self._notify()

    async def wait_until(self, *, asked: bool) -> None:
        """Return once somebody asks for a pause, or once nobody does."""
        while self.asked is not asked:
            await self._changed.wait()

    async def wait_to_end_sessions(self) -> None:
        """Return once sessions are to end."""
        while not self.ends_sessions:
            await self._changed.wait()

    async def wait_asked_or(self, stop: trio.Event) -> None:
        """Return once somebody asks for a pause, or ``stop`` is set."""
        await _first(stop, self, asked=True)

    async def wait_lifted_or(self, stop: trio.Event) -> None:
        """Return once nobody asks for a pause, or ``stop`` is set."""
        await _first(stop, self, asked=False)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


async def _first(stop: trio.Event, pausing: Pausing, *, asked: bool) -> None:
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            await pausing.wait_until(asked=asked)
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        await stop.wait()
        nursery.cancel_scope.cancel()


async def keep_paused(servers: Sequence[BlockServer], pausing: Pausing) -> None:
    """Have these take no new work while anybody asks for a pause, until cancelled."""
    while True:
        asked = pausing.asked
        for server in servers:
            if asked:
                server.pause()
            else:
                server.resume()
        await pausing.wait_until(asked=not asked)


async def end_sessions_when_asked(served: ServedBlocks, pausing: Pausing) -> None:
    """End those of these blocks once they are to end."""
    await pausing.wait_to_end_sessions()
    async with trio.open_nursery() as ending:
        for server in served.servers:
            ending.start_soon(server.end_sessions)


async def stay_paused(
    served: ServedBlocks, state: ModelState, pausing: Pausing, stop: trio.Event, **facts: object
) -> None:
    """Have these blocks take no new work until nobody asks for a pause, or ``stop`` is set.

    Sessions that run go on, unless they are to end. The servers are left paused. The records are not written here:
    whoever keeps those knows of ``pausing``. ``facts`` are logged with the phase.
    """
    for server in served.servers:
        server.pause()
    state.enter(Phase.PAUSED, reason=pausing.reason, sessions=served.open_sessions, **facts)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_sessions_when_asked, served, pausing)
        await pausing.wait_lifted_or(stop)
        nursery.cancel_scope.cancel()
