"""The idle rule in simulated time, and what reads how much others use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kwaainet_bridge.config import IdleConfig, parse_config
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.idle import IDLE, IdleRule, IdleWatch, Read, reader_for
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.use_of_gpu import _FIRST_NAMESPACE, GpuReader, uuids_of

RULE = IdleConfig(watch="cpu", pause_above=20, pause_seconds=10, resume_below=10, resume_seconds=60)


def states(rule: IdleRule, *uses: tuple[float, float]) -> list[bool]:
    return [rule.see(percent, now) for now, percent in uses]


def test_others_count_once_they_use_much_for_long_and_until_they_use_little_for_long() -> None:
    rule = IdleRule(RULE)
    assert states(rule, (0, 0), (5, 90), (10, 90), (14, 90)) == [False] * 4
    assert states(rule, (15, 21)) == [True]
    # between the bounds nothing changes, whatever it was before
    assert states(rule, (20, 15), (500, 15), (1000, 10)) == [True] * 3
    assert states(rule, (1005, 5), (1064, 0)) == [True] * 2
    assert states(rule, (1065, 9)) == [False]
    assert states(rule, (2000, 15), (3000, 20)) == [False] * 2


def test_a_moment_on_the_other_side_begins_the_wait_anew() -> None:
    rule = IdleRule(RULE)
    assert states(rule, (0, 50), (9, 50), (10, 20), (11, 50), (20, 50)) == [False] * 5
    assert states(rule, (21, 50)) == [True]
    assert states(rule, (30, 0), (89, 0), (90, 10), (91, 0), (150, 0)) == [True] * 5
    assert states(rule, (151, 0)) == [False]


def test_without_waits_each_look_decides() -> None:
    rule = IdleRule(IdleConfig(watch="cpu", pause_seconds=0, resume_seconds=0))
    assert states(rule, (0, 50), (1, 0), (2, 50)) == [True, False, True]


class Use:
    """What others use; ``error`` is raised instead, if there is one."""

    def __init__(self) -> None:
        self.percent = 0.0
        self.error: OSError | None = None

    def __call__(self) -> float:
        if self.error is not None:
            raise self.error
        return self.percent


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    # simulated time does not wait for threads
    async def at_once(read: Callable[[], float], **_options: bool) -> float:
        await trio.lowlevel.checkpoint()
        return read()

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    return Use()


async def test_the_node_pauses_and_resumes_by_the_rule(
    use: Use, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    state = NodeState()
    nursery.start_soon(IdleWatch(RULE, use, state).run)
    await trio.sleep(100)
    assert not state.pausing.asked
    use.percent = 57.4
    await trio.sleep(5)
    assert not state.pausing.asked
    await trio.sleep(15)
    assert state.pausing.reason == "others use the cpu: 57 % (idle.pause_above: 20)"
    assert not state.pausing.ends_sessions
    use.percent = 3
    await trio.sleep(30)
    assert state.pausing.asked
    await trio.sleep(40)
    assert not state.pausing.asked


async def test_what_a_person_has_paused_stays_so(
    use: Use, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    state = NodeState()
    nursery.start_soon(IdleWatch(RULE, use, state).run)
    state.pausing.ask("operator", "by hand")
    use.percent = 100
    await trio.sleep(60)
    assert state.pausing.reason is not None
    assert state.pausing.reason.startswith("by hand; others use the cpu")
    use.percent = 0
    await trio.sleep(120)
    assert state.pausing.reason == "by hand"


async def test_a_node_that_a_person_has_resumed_stays_so_until_others_come_again(
    use: Use, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    state = NodeState()
    nursery.start_soon(IdleWatch(RULE, use, state).run)
    use.percent = 100
    await trio.sleep(60)
    assert state.pausing.asked
    state.pausing.lift()
    await trio.sleep(3600)
    assert not state.pausing.asked
    use.percent = 0
    await trio.sleep(120)
    use.percent = 100
    await trio.sleep(60)
    assert state.pausing.asked


async def test_what_cannot_be_read_degrades_the_node_and_changes_nothing(
    use: Use, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    state = NodeState()
    nursery.start_soon(IdleWatch(RULE, use, state).run)
    use.percent = 100
    await trio.sleep(60)
    use.error = OSError(0, "the driver is gone")
    await trio.sleep(3600)
    assert state.pausing.asked
    assert state.degraded == {IDLE: "what others use of the cpu cannot be read: [Errno 0] the driver is gone"}
    use.error, use.percent = None, 0
    await trio.sleep(120)
    assert not state.pausing.asked
    assert not state.degraded


async def test_another_rule_begins_anew(use: Use, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    state = NodeState()
    watch = IdleWatch(IdleConfig(), None, state)
    nursery.start_soon(watch.run)
    use.percent = 50
    await trio.sleep(600)
    assert not state.pausing.asked  # it is off
    watch.follow(RULE.model_copy(update={"end_sessions": True}), use)
    await trio.sleep(30)
    assert state.pausing.asked
    assert state.pausing.ends_sessions
    watch.follow(RULE.model_copy(update={"pause_above": 60.0}), use)
    assert not state.pausing.asked
    await trio.sleep(600)
    assert not state.pausing.asked
    use.percent = 70
    await trio.sleep(30)
    assert state.pausing.asked
    watch.follow(IdleConfig(), None)
    await trio.sleep(600)
    assert not state.pausing.asked


# --- what others use of the processors


def test_this_process_and_its_children_are_not_others() -> None:
    config = parse_config("", "test", {"idle": {"watch": "cpu"}})
    read = reader_for(config)
    assert read is not None
    spins = "import time\nuntil = time.monotonic() + 0.6\nwhile time.monotonic() < until: pass"
    read()
    began = time.process_time()
    with subprocess.Popen([sys.executable, "-c", spins]) as child:
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            pass
        of_others = read()
        child.wait()
    share = 100 * (time.process_time() - began) / (0.4 * (os.cpu_count() or 1))
    # others may be busy on this machine; what this test spends on two processors must not be in it
    assert 0 <= of_others <= max(0.0, 100 - share) + 15
    assert 0 <= read() <= 100


def test_what_a_stranger_spends_is_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    read = reader_for(parse_config("", "test", {"idle": {"watch": "cpu"}}))
    assert read is not None
    times = SimpleNamespace(user=0.0, system=0.0, children_user=0.0, children_system=0.0)
    whole = [0.0, 0.0]  # busy, idle
    Times = __import__("collections").namedtuple("Times", "user idle")
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(*whole))
    monkeypatch.setattr(read, "_process", SimpleNamespace(cpu_times=lambda: times, children=lambda **_: []))
    read()
    whole[:] = [6.0, 4.0]
    times.user = 2.0
    assert read() == pytest.approx(40)
    assert read() == 0.0  # no time has passed
    whole[:] = [16.0, 4.0]
    times.user, times.children_user = 5.0, 7.0
    assert read() == 0.0


def test_a_machine_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(
        ConfigError, match=r"idle\.watch: cpu needs psutil.*pip install 'kwaainet-bridge\[idle\]'"
    ):
        reader_for(parse_config("", "test", {"idle": {"watch": "cpu"}}))


# --- what others use of GPUs: a stand-in for the driver's library


class Driver(ModuleType):
    """NVIDIA's library with the GPUs ``uses``: samples of (process, percent, time) of each."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    def __init__(self, *uses: list[tuple[int, int, int]]) -> None:
        super().__init__("pynvml")
        self.uses = list(uses)
        self.error: Exception | None = None
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:
        if self.error is not None:
            raise self.error

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uses)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        self.asked.append(name)
        return int(name.removeprefix("GPU-"))

    def nvmlDeviceGetProcessUtilization(self, handle: int, since: int) -> list[Any]:
        if self.error is not None:
            raise self.error
        found = [s for s in self.uses[handle] if s[2] > since]
        if not found:
            raise self.NVMLError_NotFound
        return [SimpleNamespace(pid=pid, smUtil=percent, timeStamp=at) for pid, percent, at in found]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver([], [])
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


def gpu_reader(*uuids: str, own: set[int] | None = None) -> Read:
    return GpuReader(lambda: uuids, own=lambda: own or {7}, namespace=lambda: _FIRST_NAMESPACE)


def test_the_busiest_gpu_counts_without_what_the_node_uses(driver: Driver) -> None:
    read = gpu_reader(own={7, 8})
    assert read() == 0
    driver.uses[0] = [(7, 90, 1), (8, 50, 1), (20, 10, 1), (20, 30, 2), (21, 5, 2)]
    driver.uses[1] = [(7, 99, 1), (22, 24, 1)]
    assert read() == 25  # 20 on average, and 5
    assert read() == 0  # samples count once
    driver.uses[1] += [(23, 80, 3), (24, 80, 3)]
    assert read() == 100


def test_only_the_gpus_of_the_models_count(driver: Driver) -> None:
    read = gpu_reader("GPU-1")
    driver.uses[0] = [(20, 99, 1)]
    driver.uses[1] = [(20, 12, 1)]
    assert read() == 12
    assert driver.asked == ["GPU-1"]


def test_a_driver_that_does_not_tell(driver: Driver) -> None:
    read = gpu_reader()
    driver.error = Driver.NVMLError("Not Supported")
    with pytest.raises(OSError, match="driver says: Not Supported"):
        read()
    with pytest.raises(ConfigError, match=r"driver does not answer \(Not Supported\): install it"):
        gpu_reader()
    driver.error, driver.uses = None, []
    with pytest.raises(OSError, match="there is no GPU"):
        gpu_reader()()


def test_where_process_ids_are_not_those_of_the_driver(driver: Driver) -> None:
    with pytest.raises(ConfigError, match="in a container the driver's process ids are not those seen here"):
        GpuReader(list, namespace=lambda: 4026532000)
    GpuReader(list, namespace=lambda: None)  # a system without such namespaces


def test_gpus_of_which_torch_knows_nothing() -> None:
    import torch

    assert uuids_of([]) == []
    if not torch.cuda.is_available():
        with pytest.raises(OSError, match="torch does not tell which GPUs it uses"):
            uuids_of([0])


def test_it_is_off_unless_asked_for() -> None:
    assert reader_for(parse_config("", "test", {})) is None
    assert parse_config("idle: {watch: off}", "test").idle.watch == "off"
    with pytest.raises(ConfigError, match=r"idle\.pause_above"):
        parse_config("idle: {pause_above: 101}", "test")


async def test_a_look_runs_in_a_thread(nursery: trio.Nursery) -> None:
    threads: list[int] = []
    looked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def read() -> float:
        threads.append(threading.get_ident())
        token.run_sync_soon(looked.set)
        return 0.0

    nursery.start_soon(IdleWatch(RULE, read, NodeState()).run)
    with trio.fail_after(10):
        await looked.wait()
    assert threads != [threading.get_ident()]
