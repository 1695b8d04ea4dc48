"""This package in code without an event loop: a training loop, a notebook.

::

    with open_portal() as portal:
        peer = portal.enter(open_peer(["/ip4/…/tcp/…/p2p/…"]))
        averager = portal.enter(Averager(peer, tensors, prefix="run", target_group_size=4))
        while training:
            ...
            portal.call(averager.step, weight=8.0)

The loop runs in a thread of its own, where other peers are answered meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from typing import Generic, ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")


class Portal:
    """The way into the loop's thread. To be used from any other thread, within ``open_portal``."""

    def __init__(self, token: trio.lowlevel.TrioToken, nursery: trio.Nursery, entered: ExitStack) -> None:
        self._token = token
        self._nursery = nursery
        self._entered = entered

    def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the coroutine function returns or raises; this thread waits for it.

        Interrupted (Ctrl-C): the call goes on in its thread, until it ends or what it is about is closed.
        """
        return trio.from_thread.run(partial(function, *args, **kwargs), trio_token=self._token)

    def call_now(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same of a function that is no coroutine: ``portal.call_now(averager.begin, weight=8.0)``."""
        return trio.from_thread.run_sync(partial(function, *args, **kwargs), trio_token=self._token)

    def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter an asynchronous context. It is left at the end of the portal, the last one first."""
        return self._entered.enter_context(self.within(manager))

    @contextmanager
    def within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """The same for a block: ``with portal.within(averager.lock): ...``."""
        held = _Held(manager)
        self.call_now(self._nursery.start_soon, held.hold)
        entered = held.entered.result()
        error = None
        try:
            yield entered
        except BaseException as e:
            error = e
            raise
        finally:
            self.call_now(held.leave, error)
            held.left.result()


class _Held(Generic[T]):
    """A context that one task enters and leaves, as trio's must be, while another thread is in the block."""

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self.entered: Future[T] = Future()
        self.left: Future[None] = Future()
        self._manager = manager
        self._leave = trio.Event()
        self._error: BaseException | None = None

    def leave(self, error: BaseException | None) -> None:
        """Leave it, with the error of the block."""
        self._error = error
        self._leave.set()

    async def hold(self) -> None:
        try:
            async with self._manager as value:
                self.entered.set_result(value)
                await self._leave.wait()
                if self._error is not None:
                    raise self._error  # noqa: TRY301 - through the context
        except BaseException as e:
            waiting = self.left if self.entered.done() else self.entered
            if e is not self._error:
                waiting.set_exception(e)
            if isinstance(e, trio.Cancelled):
                raise
        finally:
            if not self.left.done():
                self.left.set_result(None)


@contextmanager
def open_portal() -> Iterator[Portal]:
    """Run a loop in a thread of its own within the block. At its end the contexts that were entered are left."""
    opened: Future[Portal] = Future()
    stop = trio.Event()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            opened.set_result(Portal(trio.lowlevel.current_trio_token(), nursery, entered))
            await stop.wait()

    with ExitStack() as thread:
        runner = threading.Thread(target=trio.run, args=(main,), name="kwaainet-bridge")
        with ExitStack() as entered:
            runner.start()
            thread.callback(runner.join)
            portal = opened.result()
            thread.callback(portal.call_now, stop.set)
            yield portal
