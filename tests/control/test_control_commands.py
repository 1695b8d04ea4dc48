"""``drain``, ``pause``, ``resume`` and ``reload`` as a person types them, and the signals of ``run``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
import yaml
from node_support import node_config, running_node

from kwaainet_bridge.cli import control
from kwaainet_bridge.config import NodeConfig, load_config
from kwaainet_bridge.errors import ConfigError, NetworkError, RemoteError
from kwaainet_bridge.node.state import Phase

EACH: list[Callable[[NodeConfig], None]] = [
    partial(control.drain, wait=False, as_json=False),
    partial(control.pause, now=False, as_json=False),
    partial(control.resume, as_json=False),
    partial(control.reload, as_json=False),
]


async def test_pause_resume_reload_and_drain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"identity": {"kind": "ed25519"}, "listen": ["/ip4/127.0.0.1/tcp/0"]}
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(settings))
    config = load_config(file)

    async def ask(command: Callable[[], None]) -> str:
        capsys.readouterr()
        await trio.to_thread.run_sync(command)
        out: str = capsys.readouterr().out
        return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("20"))

    async with running_node(config, read=lambda: load_config(file)) as node:
        await node.serving()
        pause = partial(control.pause, config, as_json=False)
        assert await ask(partial(pause, now=False)) == "paused; 0 sessions may go on to the end\n"
        assert node.state.phase is Phase.PAUSED
        assert await ask(partial(pause, now=True)) == "paused; 0 sessions to end now\n"
        told = await ask(partial(control.pause, config, now=False, as_json=True))
        assert json.loads(told) == {"paused": "the operator has paused it", "sessions": 0}
        assert await ask(partial(control.resume, config, as_json=False)) == "takes work again\n"
        assert node.state.phase is Phase.SERVING

        reload = partial(control.reload, config, as_json=False)
        assert await ask(reload) == "nothing has changed\n"
        file.write_text(yaml.safe_dump({**settings, "limits": {"streams": 9}, "drain_seconds": 3}))
        assert await ask(reload) == "applied        limits.streams\nneeds restart  drain_seconds\n"
        file.write_text("limits: {streams: -1}")
        with pytest.raises(ConfigError, match=r"node\.yaml:\n  limits\.streams: .*greater than 0"):
            await ask(reload)
        assert node.state.host is not None
        assert node.state.host.inbound.limit == 9

        assert await ask(partial(control.drain, config, wait=True, as_json=False)) == (
            "drains: 0 sessions, 60 s at most for them\nhas ended\n"
        )
        with trio.fail_after(10):
            await node.state.wait_for(Phase.STOPPED)


@pytest.mark.parametrize("command", EACH)
def test_without_a_node(tmp_path: Path, command: Callable[[NodeConfig], None]) -> None:
    with pytest.raises(NetworkError, match="no node answers at unix"):
        command(node_config(tmp_path, "node"))
    with pytest.raises(ConfigError, match=r"admin\.listen is off"):
        command(node_config(tmp_path, "node", admin={"listen": "off"}))


async def test_a_node_that_wants_another_token(tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        (tmp_path / name).write_text(f"the {name} token of all".replace(" ", "-"))
        (tmp_path / name).chmod(0o600)
    async with running_node(node_config(tmp_path, "node", admin={"token_file": "right"})) as node:
        config = node_config(tmp_path, "node", admin={"token_file": "wrong"})
        for command in EACH:
            with pytest.raises(ConfigError, match="wants another token"):
                await trio.to_thread.run_sync(command, config)
        assert not node.stop.is_set()


def test_an_older_node_and_one_that_refuses(tmp_path: Path) -> None:
    from kwaainet_bridge.cli.admin_client import AdminClient

    answers = {404: ({}, "knows fewer commands"), 409: ({"error": "it drains"}, "it drains")}
    for code, (body, told) in answers.items():
        client = AdminClient(httpx.Client(), "there")
        with pytest.raises(RemoteError, match=told):
            client.json_of(httpx.Response(code, json=body))


def test_waiting_ends_with_the_node_or_another_start_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    uptimes: list[float] = [10.0, 10.5, 11.0, 0.5]
    monkeypatch.setattr(control.time, "sleep", lambda _seconds: None)

    class Node:
        def get(self, _path: str) -> dict[str, float]:
            if not uptimes:
                raise NetworkError("it has gone")
            return {"uptime_seconds": uptimes.pop(0)}

    monkeypatch.setattr(control, "asking", lambda _config: nullcontext(Node()))
    config = NodeConfig()
    control._wait_until_gone(config, Node().get(""))
    assert uptimes == []
    uptimes.extend([1.0, 2.0])
    control._wait_until_gone(config, {"uptime_seconds": 1.0})
    assert uptimes == []


@pytest.fixture
def hangups() -> Iterator[None]:
    """Children have SIGHUP by default, though the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # a handler, which no child inherits
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
def test_the_program_is_told_by_commands_and_by_signals(tmp_path: Path) -> None:
    settings = {
        "identity": {"kind": "ed25519"},
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "log": {"format": "text"},
    }
    file, log = tmp_path / "node.yaml", tmp_path / "log"
    file.write_text(yaml.safe_dump(settings))
    program = [sys.executable, "-m", "kwaainet_bridge"]

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*program, *arguments, "-c", str(file)], capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    with log.open("w") as stderr:
        node = subprocess.Popen(
            [*program, "run", "-c", str(file)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # no terminal
        )
        with node:
            try:
                assert node.stdout is not None
                while not node.stdout.readline().startswith("serving"):
                    assert node.poll() is None
                assert run("pause")[0] == 0
                code, told = run("status")
                assert "phase       paused for" in told
                assert run("resume")[0] == 0
                file.write_text(yaml.safe_dump({**settings, "limitz": {}}))
                code, told = run("reload")
                assert (code, "limitz: unknown key" in told) == (2, True)
                file.write_text(yaml.safe_dump({**settings, "limits": {"streams": 9}}))
                node.send_signal(signal.SIGHUP)
                code, told = run("drain", "--wait")
                assert (code, told.splitlines()[-1]) == (0, "has ended")
                assert node.wait(30) == 0
                assert run("drain")[0] == 1
            finally:
                node.kill()
    text = log.read_text()
    assert "configuration reloaded" in text
    assert "limits.streams" in text


ON_A_TERMINAL = """
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-m", "kwaainet_bridge", "run", "-c", sys.argv[1]])
seen = b""
while b"serving " not in seen:
    seen += os.read(terminal, 4096)
if sys.argv[2] == "close":
    os.close(terminal)
else:
    import signal
    os.kill(child, signal.SIGHUP)
    while b"configuration reloaded" not in seen:
        seen += os.read(terminal, 4096)
    os.kill(child, signal.SIGTERM)
    while True:
        try:
            os.read(terminal, 4096)
        except OSError:
            break
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("does", ["close", "signal"])
def test_a_terminal_that_is_closed_drains_the_node_and_a_signal_from_elsewhere_does_not(
    tmp_path: Path, does: str
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("{identity: {kind: ed25519}, listen: [/ip4/127.0.0.1/tcp/0], log: {format: json}}")
    helper = [sys.executable, "-c", ON_A_TERMINAL, str(file), does]
    done = subprocess.run(helper, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "0\n", done.stderr
    assert not (tmp_path / "identity.key.sock").exists()
