"""What a service manager hears of a node, at a socket like its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing
import yaml

from kwaainet_bridge import defaults
from kwaainet_bridge.node.readiness import ENGINE
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.supervision import tell_supervisor

PATIENCE = defaults.SUPERVISOR_PATIENCE_SECONDS
ASKED = f"EXTEND_TIMEOUT_USEC={int(PATIENCE * 1e6)}"


class Manager:
    """A service manager's side of the socket, and what it has heard."""

    def __init__(self, address: str) -> None:
        self.sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
        self.address = address
        self.heard: list[str] = []
        self.marked = trio.Event()

    async def read(self) -> None:
        """Until cancelled; the kernel keeps ten messages only."""
        while True:
            message = (await self.sock.recv(4096)).decode()
            if message == "mark":
                self.marked.set()
            else:
                self.heard.append(message)

    async def until(self, word: str) -> list[str]:
        """What it heard up to ``word``."""
        while not self.heard or self.heard[-1] != word:
            self.heard.append((await self.sock.recv(4096)).decode())
        return self.heard

    async def all(self) -> list[str]:
        """What came since it was asked last."""
        await trio.testing.wait_all_tasks_blocked()
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as sock:
            await sock.sendto(b"mark", self.address)
        await self.marked.wait()
        heard, self.heard, self.marked = self.heard, [], trio.Event()
        return heard


@asynccontextmanager
async def supervised(address: str, state: NodeState, *, stop: trio.Event | None = None, **environ: str):
    manager = Manager(address)
    with manager.sock:
        await manager.sock.bind(address)
        name = f"@{address[1:]}" if address[0] == "\0" else address
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                known = {"NOTIFY_SOCKET": name, **environ}
                await tell_supervisor(
                    state,
                    trio.Event() if stop is None else stop,
                    environ=known,
                    pid=7,
                    monotonic_ns=lambda: 12_345_678,
                )

            nursery.start_soon(manager.read)
            nursery.start_soon(tell)
            yield manager
            nursery.cancel_scope.cancel()


def with_blocks() -> NodeState:
    state = NodeState()
    state.add_model("model", ["petals"])
    return state


@pytest.fixture(params=["path", "abstract"])
def address(request, tmp_path):
    return str(tmp_path / "notify") if request.param == "path" else f"\0kwaainet-bridge-test-{os.getpid()}"


async def test_a_node_is_ready_once_its_blocks_are_served(address, autojump_clock):
    state = with_blocks()
    async with supervised(address, state) as manager:
        assert set(await manager.all()) == {"STATUS=starting", ASKED}
        state.enter(Phase.BOOTSTRAPPING)
        assert await manager.all() == ["STATUS=bootstrapping"]
        state.enter(Phase.LOADING, blocks="0:4")
        assert await manager.all() == ["STATUS=loading blocks 0:4"]
        state.enter(Phase.SERVING, blocks="0:4")
        assert sorted(await manager.all()) == ["READY=1", "STATUS=serving blocks 0:4"]
        state.enter(Phase.DRAINING, moves_to="4:8")
        assert await manager.all() == ["STATUS=draining"]
        state.enter(Phase.SERVING, blocks="4:8")
        assert await manager.all() == [
            "STATUS=serving blocks 4:8"
        ]  # ready is said once, and a move stops nothing


async def test_a_node_without_blocks_is_ready_once_it_listens(address, autojump_clock):
    state = NodeState()
    async with supervised(address, state) as manager:
        assert "READY=1" not in await manager.all()
        state.enter(Phase.BOOTSTRAPPING)
        assert "READY=1" in await manager.all()


async def test_a_start_that_takes_long_asks_to_wait_on(address, autojump_clock):
    state = with_blocks()
    async with supervised(address, state) as manager:
        await trio.sleep(PATIENCE * 10 + 1)
        assert (await manager.all()).count(ASKED) == 31
        state.enter(Phase.SERVING)
        await manager.all()
        await trio.sleep(PATIENCE * 10)
        assert await manager.all() == []


async def test_a_drain_is_told_and_asks_to_wait(address, autojump_clock):
    state, stop = with_blocks(), trio.Event()
    async with supervised(address, state, stop=stop) as manager:
        state.enter(Phase.SERVING)
        await manager.all()
        await trio.sleep(PATIENCE)
        await manager.all()
        stop.set()
        state.enter(Phase.DRAINING)
        assert sorted(await manager.all()) == [ASKED, "STATUS=draining", "STOPPING=1"]
        await trio.sleep(PATIENCE)
        assert set(await manager.all()) == {ASKED}


async def test_the_watchdog_is_told_at_half_its_time(address, autojump_clock):
    state = with_blocks()
    async with supervised(address, state, WATCHDOG_USEC="8000000", WATCHDOG_PID="7") as manager:
        state.enter(Phase.SERVING)
        await trio.sleep(21)
        assert (await manager.all()).count("WATCHDOG=1") == 6


async def test_the_watchdog_is_not_told_while_the_engine_does_not_compute(address, autojump_clock):
    state = with_blocks()
    async with supervised(address, state, WATCHDOG_USEC="8000000") as manager:
        state.enter(Phase.SERVING)
        await manager.all()
        model = state.models["model"]
        model.degrade(ENGINE, "it hangs")
        state.degrade("reachable", "a peer's words\nREADY=1")
        await trio.sleep(60)
        heard = await manager.all()
        assert "WATCHDOG=1" not in heard
        assert "STATUS=serving; degraded: reachable, engine" in heard
        model.recover(ENGINE)
        await trio.sleep(5)
        assert "WATCHDOG=1" in await manager.all()


async def test_other_conditions_are_none_of_the_watchdogs_business(address, autojump_clock):
    state = with_blocks()
    async with supervised(address, state, WATCHDOG_USEC="8000000") as manager:
        state.degrade("reachable", "nobody gets through")
        await trio.sleep(9)
        assert (await manager.all()).count("WATCHDOG=1") == 3


@pytest.mark.parametrize(
    "environ", [{}, {"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "8"}], ids=["none", "of another process"]
)
async def test_without_a_watchdog(address, autojump_clock, environ):
    async with supervised(address, with_blocks(), **environ) as manager:
        await trio.sleep(60)
        assert "WATCHDOG=1" not in await manager.all()


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "1e400"])
async def test_a_watchdog_without_a_time_is_logged(tmp_path, autojump_clock, text):
    with structlog.testing.capture_logs() as events:
        async with supervised(str(tmp_path / "notify"), with_blocks(), WATCHDOG_USEC=text) as manager:
            await trio.sleep(60)
            assert "WATCHDOG=1" not in await manager.all()
    assert [e["event"] for e in events if e["log_level"] == "warning"] == ["watchdog not told"]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
async def test_without_a_service_manager_it_returns(environ):
    with trio.fail_after(5):
        await tell_supervisor(NodeState(), trio.Event(), environ=environ)


async def test_a_socket_of_another_kind_is_logged():
    with structlog.testing.capture_logs() as events:
        await tell_supervisor(NodeState(), trio.Event(), environ={"NOTIFY_SOCKET": "vsock:2:1"})
    assert "vsock:2:1" in events[0]["reason"]


async def test_a_manager_that_is_gone_is_logged_once_and_heard_of_no_more(tmp_path, autojump_clock):
    state, address = with_blocks(), str(tmp_path / "notify")
    with structlog.testing.capture_logs() as events:
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                await tell_supervisor(
                    state, trio.Event(), environ={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "8000000"}
                )

            nursery.start_soon(tell)
            await trio.sleep(60)
            manager = Manager(address)
            with manager.sock:
                await manager.sock.bind(address)
                nursery.start_soon(manager.read)
                await trio.sleep(5)
                assert "WATCHDOG=1" in await manager.all()
                nursery.cancel_scope.cancel()
    told = [e for e in events if e["event"] == "service manager not told"]
    assert len(told) == 1
    assert told[0]["address"] == address


def begin(state: NodeState) -> None:
    state.reloads_begun += 1
    state.notify()


def end(state: NodeState) -> None:
    state.reloads_ended += 1
    state.notify()


async def test_a_paused_node_has_started(tmp_path, autojump_clock):
    state = with_blocks()
    async with supervised(str(tmp_path / "notify"), state) as manager:
        state.enter(Phase.PAUSED, reason="others use the gpu")
        heard = await manager.all()
        assert "READY=1" in heard
        await trio.sleep(600)
        assert ASKED not in await manager.all()
        state.enter(Phase.SERVING)
        assert await manager.all() == ["STATUS=serving"]


async def test_a_reload_is_told_from_its_beginning_to_its_end(tmp_path, autojump_clock):
    state = with_blocks()
    begin(state)
    end(state)  # while it starts, the manager waits for the start
    async with supervised(str(tmp_path / "notify"), state) as manager:
        assert not any("RELOADING" in word for word in await manager.all())
        state.enter(Phase.SERVING)
        assert "READY=1" in await manager.all()
        begin(state)
        assert await manager.all() == ["RELOADING=1\nMONOTONIC_USEC=12345"]
        end(state)
        assert await manager.all() == ["READY=1"]
        begin(state)  # one that is over before anybody looks
        end(state)
        assert await manager.all() == ["RELOADING=1\nMONOTONIC_USEC=12345", "READY=1"]


def test_the_unit_reloads_by_the_command() -> None:
    unit = Path(__file__).parents[2] / "packaging" / "systemd" / "kwaainet-bridge.service"
    lines = dict(
        line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"
    )
    start, reload = lines["ExecStart"].split(), lines["ExecReload"].split()
    assert (start[0], start[-2:]) == (reload[0], reload[-2:])
    assert reload[1] == "reload"


async def run_as_a_service(folder, **settings) -> list[str]:
    """``kwaainet-bridge run`` with a service manager; what it is told until the process has ended."""
    config = {"identity": {"kind": "ed25519"}, "listen": ["/ip4/127.0.0.1/tcp/0"], **settings}
    (folder / "node.yaml").write_text(yaml.safe_dump(config))
    manager = Manager(str(folder / "notify"))
    command = [sys.executable, "-m", "kwaainet_bridge", "run", "-c", str(folder / "node.yaml")]
    environ = {**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    with manager.sock:
        await manager.sock.bind(manager.address)
        async with trio.open_nursery() as nursery:
            start = trio.run_process
            process = await nursery.start(
                lambda task_status: start(
                    command, env=environ, stdout=subprocess.DEVNULL, task_status=task_status
                )
            )
            with trio.fail_after(60):
                await manager.until("READY=1")
                await manager.until("WATCHDOG=1")
                process.send_signal(signal.SIGTERM)
                await manager.until("STOPPING=1")
    return manager.heard


@pytest.mark.slow
async def test_the_command_tells_its_service_manager(tmp_path):
    heard = await run_as_a_service(tmp_path)
    assert heard[0] in {"STATUS=starting", "STATUS=bootstrapping", ASKED, "WATCHDOG=1"}  # it starts fast
    assert heard[-1] == "STOPPING=1"
