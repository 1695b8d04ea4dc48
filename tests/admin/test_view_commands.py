"""``kwaainet-bridge peers``, ``sessions``, ``blocks`` and ``logs``: what people see, and how the commands end."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
import torch
import trio
from admin_support import answering, free_port, logging_to
from node_support import NOWHERE, PREFIX, node_config, running_node
from typer.testing import CliRunner

from kwaainet_bridge import defaults
from kwaainet_bridge.cli import log_view, watching
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.log_view import show_logs
from kwaainet_bridge.cli.views import BLOCKS, PEERS, SESSIONS
from kwaainet_bridge.cli.watching import show_view
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError, RemoteError
from kwaainet_bridge.hivemind.client import Directory, Swarm, open_session
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.node.log_ring import LogRing

log = logging.getLogger("kwaainet_bridge.tests")
OPTIONS = {"level": "debug", "last": 200, "follow": False, "as_json": False}


@pytest.fixture
def logged():
    """A ring that has this process' log, and nothing else has it."""
    ring = LogRing()
    with logging_to(ring):
        yield ring


async def shown(capsys, show, *arguments, **options) -> str:
    """What a command prints about a node of this process."""
    capsys.readouterr()
    await trio.to_thread.run_sync(lambda: show(*arguments, **options))
    return capsys.readouterr().out


async def view_of(capsys, config: NodeConfig, view, *, as_json: bool = False) -> str:
    return await shown(capsys, show_view, config, view, watch=False, as_json=as_json)


async def test_tables_of_a_node_with_a_client(tmp_path, capsys, logged):
    config = node_config(tmp_path, "node", blocks="0:8")
    async with running_node(config) as node:
        node.state.logs = logged
        await node.serving()
        assert await view_of(capsys, config, SESSIONS) == "no session is open\n"
        assert await view_of(capsys, config, PEERS) == "no peer is connected\n"
        async with open_peer([node.address], client_mode=True) as peer:
            swarm = Swarm(peer.client, Directory(peer.dht, PREFIX, 8))
            async with open_session(swarm, batch_size=2, max_length=40) as session:
                await session.step(torch.zeros(2, 5, 64))
                header, row = (await view_of(capsys, config, SESSIONS)).splitlines()
                assert header.split() == [
                    "network",
                    "model",
                    "peer",
                    "blocks",
                    "state",
                    "tokens",
                    "of",
                    "cache",
                    "age",
                    "idle",
                ]
                assert row.startswith(f"petals   {PREFIX}  {peer.peer_id}  0:8     idle   5 x 2   40  32 (")
                told = json.loads(await view_of(capsys, config, SESSIONS, as_json=True))
                assert told["sessions"][0]["tokens"] == 5

                lines = (await view_of(capsys, config, PEERS)).splitlines()
                assert lines[0].split() == [
                    "peer",
                    "network",
                    "address",
                    "way",
                    "agent",
                    "latency",
                    "streams",
                    "age",
                ]
                assert str(peer.peer_id) in lines[1]
                assert "petals" in lines[1]
                assert "/ip4/127.0.0.1/tcp/" in lines[1]

                lines = (await view_of(capsys, config, BLOCKS)).splitlines()
                assert lines[0].split() == ["model", "block", "state", "memory", "weights", "sessions"]
                assert lines[1].startswith(f"{PREFIX}  0 of 8  serving  0.")
                assert lines[8].startswith(f"{PREFIX}  7 of 8  serving  ")
                assert all(line.endswith("MiB  float32  1       ") for line in lines[1:])

        log.warning("a\x1b[2Jb", extra={"peer": "12D3KooW", "many": [1]})
        lines = (await shown(capsys, show_logs, config, **OPTIONS)).splitlines()
        assert any(" info     serving " in line and " blocks=0:8 " in line for line in lines)
        (line,) = (await shown(capsys, show_logs, config, **OPTIONS | {"level": "warning"})).splitlines()
        assert line.endswith("warning  a?[2Jb peer=12D3KooW many=[1] [kwaainet_bridge.tests]")
        assert line.startswith("20")
        lines = (await shown(capsys, show_logs, config, **OPTIONS | {"last": 1})).splitlines()
        assert "older records are left out: --last shows more" in lines[0]
        options = OPTIONS | {"as_json": True, "level": "warning"}
        told = json.loads(await shown(capsys, show_logs, config, **options))
        assert told["records"][-1]["fields"] == {"peer": "12D3KooW", "many": [1]}


async def test_what_is_wrong_is_shown_below_the_peers(tmp_path, capsys):
    config = node_config(tmp_path, "node", bootstrap=[NOWHERE])
    async with running_node(config) as node:
        await node.serving()
        node.state.host.refused.note("address", "192.0.2.1", "too many\x1b connections", trio.current_time())
        text = await view_of(capsys, config, PEERS)
        assert "refused so far: address 1" in text
        assert "refused      192.0.2.1" in text
        assert "too many? connections" in text
        assert f"unreachable  {NOWHERE.rpartition('/')[2]}  /ip4/127.0.0.1/tcp/1  " in text
        text = await view_of(capsys, config, BLOCKS)
        assert text == "this node serves no blocks\n"


async def test_the_log_is_followed_until_it_is_interrupted(tmp_path, capsys, logged, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOW_SECONDS", 0.01)
    draw, lines = log_view._draw_record, []

    def drawn(record, out) -> None:
        draw(record, out)
        lines.append(record.get("event"))
        if record.get("event") == "before":
            log.error("now")
        if record.get("event") == "now":
            raise KeyboardInterrupt

    monkeypatch.setattr(log_view, "_draw_record", drawn)
    config = node_config(tmp_path, "node")
    async with running_node(config) as node:
        node.state.logs = logged
        await node.serving()
        log.error("before")
        text = await shown(capsys, show_logs, config, **OPTIONS | {"follow": True, "level": "error"})
        assert lines == ["before", "now"]
        assert "error    now" in text


async def test_the_node_stops_while_its_log_is_followed(tmp_path, capsys, logged):
    config = node_config(tmp_path, "node")
    async with running_node(config) as node:
        node.state.logs = logged
        await node.serving()
        options = OPTIONS | {"follow": True, "as_json": True}

        async def follow() -> None:
            with pytest.raises(NetworkError, match=r"it may just have stopped|has ended the log"):
                await trio.to_thread.run_sync(lambda: show_logs(config, **options))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                log.info("last words")
                while "last words" not in (told := capsys.readouterr().out):  # noqa: ASYNC110
                    await trio.sleep(0.02)
                await node.drained()
    assert any(json.loads(line)["event"] == "last words" for line in told.splitlines() if line[:1] == "{")


async def test_a_node_that_keeps_no_log(tmp_path, capsys):
    config = node_config(tmp_path, "node")
    async with running_node(config):
        for follow in (False, True):
            with pytest.raises(ConfigError, match="keeps no records"):
                await shown(capsys, show_logs, config, **OPTIONS | {"follow": follow})


async def test_too_many_follow(tmp_path, capsys, logged, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOWERS", 0)
    config = node_config(tmp_path, "node")
    async with running_node(config) as node:
        node.state.logs = logged
        with pytest.raises(NetworkError, match="no more are told at one time"):
            await shown(capsys, show_logs, config, **OPTIONS | {"follow": True})


async def test_a_view_is_watched_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    config = node_config(tmp_path, "node")
    async with running_node(config):
        monkeypatch.setattr(watching.time, "sleep", sleep)
        text = await shown(capsys, show_view, config, BLOCKS, watch=True, as_json=True)
        monkeypatch.undo()
    assert len([line for line in text.splitlines() if line.startswith("{")]) == 2
    assert slept == [defaults.STATUS_WATCH_SECONDS] * 2


# --- how they fail


def run(*arguments: str) -> tuple[int, str]:
    """In this process; errors that ``main`` would print are given by their names."""
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output + repr(done.exception)


@pytest.mark.parametrize("command", ["peers", "sessions", "blocks", "logs"])
def test_no_node_runs(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, told = run(command)
    assert "NetworkError" in told
    assert "no node answers at unix:" in told
    (tmp_path / "off.yaml").write_text("admin: {listen: off}")
    _, told = run(command, "-c", "off.yaml")
    assert "ConfigError" in told
    assert "admin.listen is off" in told


def test_exit_codes_are_those_of_the_page(tmp_path):
    def main(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "kwaainet_bridge", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    (tmp_path / "off.yaml").write_text("admin: {listen: off}")
    code, told = main("sessions")
    assert (code, told.startswith("error: no node answers")) == (1, True)
    code, told = main("logs", "-c", "off.yaml")
    assert (code, told.startswith("error: admin.listen is off")) == (2, True)


@pytest.mark.parametrize("arguments", [("--level", "loud"), ("--last", "-1"), ("--last", "2001")])
def test_wrong_options_of_logs_end_it_with_two(arguments):
    code, told = run("logs", *arguments)
    assert code == 2
    assert arguments[0] in told


async def test_another_token_is_refused(tmp_path, capsys, logged):
    def config(token: str) -> NodeConfig:
        path = tmp_path / token
        path.write_text(token * 20)
        path.chmod(0o600)
        return node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}", "token_file": token})

    port = free_port()
    async with running_node(config("a")) as node:
        node.state.logs = logged
        await node.serving()
        assert "no session is open" in await view_of(capsys, config("a"), SESSIONS)
        for view in (PEERS, SESSIONS, BLOCKS):
            with pytest.raises(ConfigError, match="wants another token"):
                await view_of(capsys, config("b"), view)
        for follow in (False, True):
            with pytest.raises(ConfigError, match="wants another token"):
                await shown(capsys, show_logs, config("b"), **OPTIONS | {"follow": follow})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>", "is no node"),
        (b'{"schema": 2}', "of another version"),
        (b'{"schema": 1}', "sent no"),
        (b'{"schema": 1, "missed": 0, "left_out": 0, "records": [{"at": 1e300}]}', "sent no"),
    ],
)
def test_something_else_answers(tmp_path, body, told):
    with answering(body) as port:
        config = node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}"})
        for view in (PEERS, SESSIONS, BLOCKS):
            with pytest.raises(RemoteError, match=told):
                show_view(config, view, watch=False, as_json=False)
        with pytest.raises(RemoteError, match=told):
            show_logs(config, **OPTIONS)


@pytest.mark.parametrize("body", [b"<html>\n", b"[]\n", b'{"at": 1e300}\n', b'{"at": 1, "level": 3}\n'])
def test_something_else_is_followed(tmp_path, body):
    with answering(body) as port:
        config = node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}"})
        with pytest.raises(RemoteError, match=r"is no node|sent no records"):
            show_logs(config, **OPTIONS | {"follow": True})


def test_records_in_colours_on_a_terminal_only(capsys):
    record = {
        "number": 1,
        "at": 0.5,
        "level": "error",
        "logger": "kwaainet_bridge.x",
        "event": "it failed",
        "fields": {"peer": "a"},
        "exception": "Traceback\n  ValueError: \x1b[2J",
        "cut": False,
    }
    out = log_view.Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    log_view._draw_record(record, out)
    assert "\x1b[31merror" in out.file.getvalue()
    assert "\x1b[2J" not in out.file.getvalue()
    log_view._draw_record(record, log_view.console())
    assert capsys.readouterr().out == (
        "1970-01-01 00:00:00.500 error    it failed peer=a [kwaainet_bridge.x]\n"
        "    Traceback\n      ValueError: ?[2J\n"
    )
    log_view._draw_record({"missed": 3}, log_view.console())
    assert capsys.readouterr().out == "3 records came too fast to be shown\n"


def test_rows_of_what_is_rare(capsys):
    out = watching.console()
    peer = {
        "peer": "12D3KooWaaaaaa",
        "address": None,
        "inbound": True,
        "relay": "12D3KooWbbbbbb",
        "bootstrap": True,
        "networks": ["kwaainet", "petals"],
        "agent": None,
        "round_trip_ms": None,
        "streams": 0,
        "in_use": False,
        "age_seconds": 130.0,
    }
    trouble = {
        "kind": "avoided",
        "peer": "12D3KooWcccccc",
        "where": "m in petals",
        "reason": "it is full",
        "times": 2,
        "at": None,
        "seconds_left": 14.2,
    }
    PEERS.draw(
        {"peers": [peer], "left_out": 7, "refused": {}, "troubles": [trouble], "troubles_left_out": 1}, out
    )
    text = capsys.readouterr().out
    assert "12D3KooWaaaaaa  kwaainet, petals bootstrap  in by relay …bbbbbb  0        2 min" in text
    assert "7 peers more" in text
    assert "avoided  12D3KooWcccccc  m in petals  2      14 s  it is full" in text
    assert "1 trouble more" in text
    own = {
        "kind": "own",
        "networks": ["kwaainet", "petals"],
        "model": "austen",
        "peer": None,
        "is_own_peer": True,
        "name": None,
        "first": 0,
        "end": 8,
        "state": "stepping",
        "tokens": 9,
        "max_tokens": 50,
        "batch_size": 1,
        "cache_tokens": 0,
        "cache_bytes": 0,
        "promised_tokens": 0,
        "in_host_memory": False,
        "adapter": "french",
        "age_seconds": 3.0,
        "idle_seconds": 0.0,
        "chain": [
            {"peer": "12D3KooWaaaaaa", "network": "petals", "first": 0, "end": 4},
            {"peer": "12D3KooWbbbbbb", "network": "kwaainet", "first": 4, "end": 8},
        ],
    }
    there = own | {
        "kind": "served",
        "state": "idle",
        "cache_tokens": 16,
        "cache_bytes": 4_000_000,
        "in_host_memory": True,
        "chain": [],
    }
    SESSIONS.draw({"sessions": [own, there], "left_out": 0}, out)
    text = capsys.readouterr().out
    assert "this node's text" in text
    assert "french   0:4 …aaaaaa > 4:8 …bbbbbb" in text
    assert "16 (4.0 MB) in host memory" in text
    block = {
        "model": "m",
        "block": 3,
        "of": 80,
        "state": "serving",
        "bytes": 3 << 20,
        "dtype": "bfloat16",
        "quantization": "nf4",
        "tensor_parallel": 2,
        "adapters": ["a", "b"],
        "sessions": 1,
    }
    models = [
        {"name": "m", "phase": "serving", "reason": None},
        {"name": "n", "phase": "loading", "reason": "no room\x07"},
    ]
    BLOCKS.draw({"blocks": [block], "left_out": 0, "models": models}, out)
    text = capsys.readouterr().out
    assert "m      3 of 80  serving  3.0 MiB  nf4, bfloat16  1 of 2  a, b      1" in text
    assert "n: loading: no room?" in text
