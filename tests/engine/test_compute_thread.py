"""The compute thread: order, errors, cancellation, and that nothing of it stays."""

from __future__ import annotations

import gc
import threading
import weakref

import outcome
import pytest
import torch
import trio
import trio.testing

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.compute import ComputeThread, Merged, Priority
from kwaainet_bridge.engine.scheduler import Scheduler
from kwaainet_bridge.errors import AllocationFailed, EngineError


class Gate:
    """Keeps the thread busy until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self._open.wait(10)
        return "through"

    def open(self) -> None:
        self._open.set()

    async def wait_entered(self) -> None:
        await trio.to_thread.run_sync(self.entered.wait)


@pytest.fixture
async def compute() -> object:
    thread = ComputeThread("compute under test")
    yield thread
    await thread.aclose()


async def test_results_come_back_from_one_other_thread(compute: ComputeThread) -> None:
    threads = {await compute.run(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_gradients_are_off_there_only(compute: ComputeThread) -> None:
    assert await compute.run(torch.is_grad_enabled) is False
    assert torch.is_grad_enabled()


async def test_errors_come_back_and_the_thread_goes_on(compute: ComputeThread) -> None:
    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(AllocationFailed, match="as it is"):
        await compute.run(lambda: fail(AllocationFailed("as it is")))
    with pytest.raises(EngineError, match="ZeroDivisionError: by nothing") as mapped:
        await compute.run(lambda: fail(ZeroDivisionError("by nothing")))
    assert isinstance(mapped.value.__cause__, ZeroDivisionError)
    with pytest.raises(SystemExit):
        await compute.run(lambda: fail(SystemExit(1)))
    assert await compute.run(lambda: 5) == 5


async def test_inference_overtakes_and_equals_keep_their_order(compute: ComputeThread) -> None:
    gate, order = Gate(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, gate)
        await gate.wait_entered()
        for name, priority in [
            ("batch 1", Priority.BATCH),
            ("batch 2", Priority.BATCH),
            ("step 1", Priority.INFERENCE),
            ("step 2", Priority.INFERENCE),
        ]:
            nursery.start_soon(compute.run, lambda name=name: order.append(name), priority)
            await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert order == ["step 1", "step 2", "batch 1", "batch 2"]


async def test_cancelled_while_waiting_it_never_runs(compute: ComputeThread) -> None:
    gate, ran = Gate(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, gate)
        await gate.wait_entered()
        async with trio.open_nursery() as waiting:
            waiting.start_soon(compute.run, lambda: ran.append("cancelled"))
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel_scope.cancel()
        nursery.start_soon(compute.run, lambda: ran.append("kept"))
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert ran == ["kept"]


async def test_cancelled_while_running_it_ends_first(compute: ComputeThread) -> None:
    gate, results, scope = Gate(), [], trio.CancelScope()

    async def caller() -> None:
        with scope:
            results.append(await compute.run(gate))
            await trio.lowlevel.checkpoint()
            results.append("not reached")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await gate.wait_entered()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert results == []
        gate.open()
    assert results == ["through"]


async def test_already_cancelled_it_never_runs(compute: ComputeThread) -> None:
    ran: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await compute.run(lambda: ran.append(1))
    await compute.run(lambda: None)
    assert scope.cancelled_caught
    assert ran == []


async def test_closing_fails_what_waits_and_lets_the_running_end() -> None:
    compute, gate, outcomes = ComputeThread(), Gate(), []

    async def caller(work: object) -> None:
        try:
            outcomes.append(await compute.run(work))  # type: ignore[arg-type]
        except EngineError as error:
            outcomes.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller, gate)
        await gate.wait_entered()
        nursery.start_soon(caller, lambda: "never")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(compute.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert outcomes == ["the engine was closed"]
        gate.open()
    assert outcomes == ["the engine was closed", "through"]
    with pytest.raises(EngineError, match="is closed"):
        await compute.run(lambda: None)
    await compute.aclose()


async def test_closing_leaves_no_thread_even_when_cancelled() -> None:
    compute = ComputeThread("to be gone")
    with trio.CancelScope() as scope:
        scope.cancel()
        await compute.aclose()
    assert "to be gone" not in {thread.name for thread in threading.enumerate()}


async def test_a_thread_that_dies_fails_what_waits_and_all_that_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute, gate, outcomes = ComputeThread("to die"), Gate(), []

    async def caller(work: object) -> None:
        try:
            outcomes.append(await compute.run(work))  # type: ignore[arg-type]
        except EngineError as error:
            outcomes.append(str(error))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of its own")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller, gate)
        await gate.wait_entered()
        nursery.start_soon(caller, lambda: "never")
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(Scheduler, "done", broken)
        gate.open()
    died = "the compute thread has died of RuntimeError: a mistake of its own"
    assert outcomes == [died, died]
    assert "the compute thread has died" in caplog.text
    with pytest.raises(EngineError, match="has died of RuntimeError"):
        await compute.run(lambda: None)
    with trio.fail_after(5):
        await compute.aclose()
    assert "to die" not in {thread.name for thread in threading.enumerate()}


async def test_a_caller_that_is_cancelled_while_the_thread_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, gate = ComputeThread(), Gate()
    results: list[str] = []

    async def caller(scope: trio.CancelScope) -> None:
        with scope:
            try:
                await compute.run(gate)
            except EngineError as error:
                results.append(str(error))

    def die(*_: object, **__: object) -> None:
        raise SystemExit(3)

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller, scope)
        await gate.wait_entered()
        monkeypatch.setattr(Scheduler, "done", die)
        gate.open()
        compute._thread.join(5)  # its result is on the way to the loop, which has not turned since
        scope.cancel()
    assert results == ["the compute thread has died of SystemExit: 3"]
    await compute.aclose()


async def test_a_step_that_waited_for_others_runs_in_the_end() -> None:
    """Nothing else wakes the thread: two steps ran, and one of the sessions does not come again."""
    gates = [Gate(), Gate()]
    sizes: list[int] = []
    now = 0.0
    token, held = trio.lowlevel.current_trio_token(), trio.Event()
    compute: ComputeThread | None = None

    def clock() -> float:
        if (
            compute is not None and compute._scheduler.held_until is not None
        ):  # the thread asks how long to wait
            token.run_sync_soon(held.set)
        return now

    def merged(steps: list[int]) -> list[outcome.Outcome[int]]:
        nonlocal now
        now += 10.0 * (len(sizes) == 1)
        sizes.append(len(steps))
        if len(sizes) <= len(gates):
            gates[len(sizes) - 1]()
        return [outcome.Value(step) for step in steps]

    compute = ComputeThread(merged=merged, clock=clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, Merged(0, 1))
        await gates[0].wait_entered()
        for step in (1, 2):
            nursery.start_soon(compute.run, Merged(step, 1))
        await trio.testing.wait_all_tasks_blocked()
        gates[0].open()
        await gates[1].wait_entered()
        gates[1].open()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compute.run, Merged(3, 1))
            await held.wait()
            assert sizes == [1, 2]
            now += defaults.SCHEDULER_PATIENCE_SECONDS
        assert await compute.run(Merged(4, 1)) == 4
    assert sizes == [1, 2, 1, 1]
    await compute.aclose()


async def test_an_idle_thread_keeps_no_result(compute: ComputeThread) -> None:
    result = await compute.run(lambda: torch.zeros(3))
    alive = weakref.ref(result)
    del result
    await compute.run(lambda: None)
    gc.collect()
    assert alive() is None


async def test_the_loop_runs_on_while_the_thread_works(compute: ComputeThread) -> None:
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, gate)
        await gate.wait_entered()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        gate.open()
