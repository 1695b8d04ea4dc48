"""``kwaainet-bridge status`` beside nodes that run, do not run, or are something else."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import trio
from admin_support import answering, check_documented, free_port
from node_support import NOWHERE, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.cli import status as command
from kwaainet_bridge.cli import watching
from kwaainet_bridge.cli.status import STATUS
from kwaainet_bridge.cli.watching import show_view
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError, RemoteError


def show(config: NodeConfig, *, as_json: bool = False) -> None:
    show_view(config, STATUS, watch=False, as_json=as_json)


async def test_a_running_node_is_shown(tmp_path, capsys):
    config = node_config(tmp_path, "node", bootstrap=[NOWHERE], blocks="0:2")
    async with running_node(config) as node:
        await node.serving()
        capsys.readouterr()
        await trio.to_thread.run_sync(show, config)
        text = capsys.readouterr().out
        assert str(node.contact.peer_id) in text
        for line in (
            "phase       serving for",
            "NOT READY",
            "blocks      0:2 of 8, tiny-llama-hf; 0 of 16384 cache tokens in use",
            "weights     0 MiB",
            "bootstrap petals  none of 1 bootstrap peers is reached",
            "petals   0 of 1     tiny-llama-hf",
        ):
            assert line in text
        await trio.to_thread.run_sync(lambda: show(config, as_json=True))
        check_documented(json.loads(capsys.readouterr().out.splitlines()[-1]))
        await node.drained()


async def test_watching_goes_on_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    config = node_config(tmp_path, "node")
    async with running_node(config):
        monkeypatch.setattr(watching.time, "sleep", sleep)
        await trio.to_thread.run_sync(lambda: show_view(config, STATUS, watch=True, as_json=True))
        monkeypatch.undo()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(told) == 3
    assert slept == [defaults.STATUS_WATCH_SECONDS] * 3


def test_what_averages_is_shown(capsys):
    run = {
        "phase": "averaging",
        "group": ["12D3KooWaaaaaa", "12D3KooWbbbbbb"],
        "rounds": 3,
        "steps": {"whole": 2, "partial": 1},
        "sent_bytes": 4_000_000,
        "received_bytes": 2_500_000,
        "last_group": [],
        "last_missing_elements": 0,
        "banned": [{"peer": "12D3KooWcccccc", "kind": "late", "reason": "late\x1b[2J", "at": 1.0}],
    }
    command._draw_averaging({"my run": run}, watching.console())
    text = capsys.readouterr().out
    assert "my run     averaging  2      3       2.5 MB    4.0 MB  aaaaaa, bbbbbb" in text
    assert "12D3KooWcccccc  late  late?[2J" in text


def test_no_node_runs(tmp_path):
    config = node_config(tmp_path, "node")
    with pytest.raises(NetworkError, match=r"no node answers at unix:.*node\.key\.sock.*kwaainet-bridge run"):
        show(config)
    with pytest.raises(NetworkError, match="no node answers at 127"):
        show(node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{free_port()}"}))
    with pytest.raises(ConfigError, match="off in this configuration"):
        show(node_config(tmp_path, "node", admin={"listen": "off"}))


def test_the_exit_code_and_the_message_are_those_of_the_page(tmp_path):
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "kwaainet_bridge", "status", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    code, told = run()
    assert code == 1
    assert told.startswith("error: no node answers at unix:")
    assert "identity.key.sock" in told
    assert "Traceback" not in told
    (tmp_path / "off.yaml").write_text("admin: {listen: off}")
    code, told = run("-c", "off.yaml")
    assert (code, told.startswith("error: admin.listen is off")) == (2, True)


async def test_a_node_that_wants_another_token(tmp_path, capsys):
    def config(token: str) -> NodeConfig:
        path = tmp_path / token
        path.write_text(token * 20)
        path.chmod(0o600)
        return node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}", "token_file": token})

    port = free_port()
    async with running_node(config("a")) as node:
        await node.serving()
        await trio.to_thread.run_sync(show, config("a"))
        assert str(node.contact.peer_id) in capsys.readouterr().out
        with pytest.raises(ConfigError, match="wants another token"):
            await trio.to_thread.run_sync(show, config("b"))


def test_a_node_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "STATUS_SECONDS", 0.2)
    config = node_config(tmp_path, "node")
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(config.admin_address.path))
        hung.listen()
        with pytest.raises(NetworkError, match=r"does not answer within 0\.2 s"):
            show(config)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>", "is no node"),
        (b"[]", "is no node"),
        (b'{"schema": 3, "version": "9.9"}', "of another version"),
        (b'{"schema": 2}', "sent no status"),
    ],
)
def test_something_else_answers(tmp_path, body, told):
    with answering(body) as port, pytest.raises(RemoteError, match=told):
        show(node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}"}))


def test_json_is_printed_whatever_version_it_is_of(tmp_path, capsys):
    with answering(b'{"schema": 3, "news": 1}') as port:
        show(node_config(tmp_path, "node", admin={"listen": f"127.0.0.1:{port}"}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"schema": 3, "news": 1}
