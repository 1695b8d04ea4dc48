"""The endpoint's routes, for all who serve them: its own address, and the admin side for its page."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:  # nodes that nobody asks need not import it
    from starlette.types import ASGIApp, Receive, Scope, Send


class SharedApp:
    """Made when somebody asks for the first time, in a thread: models and limits are the same for all.

    It is an ASGI application; requests that run when it is closed are cancelled. Who serves it asks for ``token``,
    if it is not None, or for another one.
    """

    def __init__(self, make: Callable[[], ASGIApp], *, token: str | None) -> None:
        self.token = token
        self._make = make
        self._making = threading.Lock()
        self._made: ASGIApp | None = None
        self._running: set[trio.CancelScope] = set()
        self._ended = trio.Event()

    def made(self) -> ASGIApp:
        """The routes. Blocks for as long as their imports take, at first."""
        with self._making:
            if self._made is None:
                self._made = self._make()
            return self._made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with trio.CancelScope() as running:
            self._running.add(running)
            try:
                app = self._made
                if app is None:
                    app = await trio.to_thread.run_sync(self.made)
                await app(scope, receive, send)
            finally:
                self._running.discard(running)
                self._ended.set()

    async def close(self) -> None:
        """Cancel what runs, and return once all of it has ended; the caller's own cancellation waits for that, too."""
        with trio.CancelScope(shield=True):
            while self._running:
                self._ended = trio.Event()
                for running in self._running:
                    running.cancel()
                await self._ended.wait()
