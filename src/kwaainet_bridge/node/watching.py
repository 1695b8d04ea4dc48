"""Two small tasks that find out whether a node's own machinery gets on: its event loop and its engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Histogram
from kwaainet_bridge.errors import EngineDied, EngineError
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.readiness import ENGINE


async def measure_lag(
    lag: Histogram,
    *,
    period: float = defaults.LAG_PERIOD_SECONDS,
    clock: Callable[[], float] = trio.current_time,
) -> None:
    """Sleep over and over, and note by how many seconds the event loop was late to wake this task. Until cancelled."""
    while True:
        due = clock() + period
        await trio.sleep(period)
        lag.observe(max(0.0, clock() - due))


async def watch_engine(
    check: Callable[[], Awaitable[None]],
    state: ModelState,
    *,
    period: float = defaults.ENGINE_CHECK_SECONDS,
    patience: float = defaults.ENGINE_PATIENCE_SECONDS,
) -> None:
    """``check`` the engine every ``period`` seconds until cancelled; its model is degraded while it gets no turn.

    ``check`` returns once the engine has had a turn, or raises EngineError. Raises EngineDied if there is nothing left
    to wait for.
    """
    while True:
        try:
            with trio.move_on_after(patience) as limit:
                await check()
        except EngineDied:
            raise
        except EngineError as e:
            state.degrade(ENGINE, f"the engine does not compute: {e}")
        else:
            if limit.cancelled_caught:
                state.degrade(
                    ENGINE,
                    f"the engine gave no turn within {patience:g} s: a computation hangs, or it is dead",
                )
            else:
                state.recover(ENGINE)
        await trio.sleep(period)
