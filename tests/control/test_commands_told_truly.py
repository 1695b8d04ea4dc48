"""What the commands say is so: a node that hangs has not ended, and files keep their owner, their mode and their place."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from test_config_migrate import OLD, STEPS

from kwaainet_bridge import defaults
from kwaainet_bridge.cli import admin_client, control
from kwaainet_bridge.cli.admin_client import NoAnswer, asking
from kwaainet_bridge.cli.migrate import migrate
from kwaainet_bridge.config import NodeConfig, anchored, parse_config
from kwaainet_bridge.errors import NetworkError


def test_a_node_that_gives_no_answer_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception] = [NoAnswer("it hangs"), NoAnswer("it hangs"), NetworkError("it has gone")]
    monkeypatch.setattr(control.time, "sleep", lambda _seconds: None)

    class Node:
        def get(self, _path: str) -> dict[str, float]:
            raise answers.pop(0)

    monkeypatch.setattr(control, "asking", lambda _config: nullcontext(Node()))
    control._wait_until_gone(NodeConfig(), {"uptime_seconds": 1.0})
    assert not answers


@pytest.mark.parametrize("backlog", [0, 8])
def test_a_node_that_hangs_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backlog: int
) -> None:
    monkeypatch.setattr(defaults, "STATUS_SECONDS", 0.2)
    config = anchored(parse_config("admin: {listen: 'unix:node.sock'}", "test"), tmp_path)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "node.sock"))
        hung.listen(backlog)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(2 if backlog == 0 else 0)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(str(tmp_path / "node.sock"))
        with pytest.raises(NoAnswer, match=r"does not answer within 0\.2 s"), asking(config) as node:
            node.get("/api/status")
        for one in waiting:
            one.close()
    assert admin_client.NoAnswer.__base__ is NetworkError


def test_a_migrated_file_and_its_copy_are_nobody_elses(tmp_path: Path) -> None:
    file, backup = tmp_path / "node.yaml", tmp_path / "node.yaml.bak"
    file.write_text(OLD)
    file.chmod(0o600)
    owner = (12345, 23456) if os.geteuid() == 0 else (file.stat().st_uid, file.stat().st_gid)
    os.chown(file, *owner)
    before = os.umask(0o022)
    try:
        assert not migrate(file, check=False, migrations=STEPS)
    finally:
        os.umask(before)
    for path in (file, backup):
        status = path.stat()
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, *owner)


def test_a_file_that_is_elsewhere_stays_there(tmp_path: Path) -> None:
    elsewhere, file = tmp_path / "elsewhere.yaml", tmp_path / "node.yaml"
    elsewhere.write_text(OLD)
    file.symlink_to(elsewhere)
    assert not migrate(file, check=False, migrations=STEPS)
    assert file.is_symlink()
    assert yaml.safe_load(elsewhere.read_text())["version"] == 3


def test_a_file_is_migrated_where_descriptors_have_no_mode_and_files_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "fchmod")
    monkeypatch.delattr(os, "chown")
    file = tmp_path / "node.yaml"
    file.write_text(OLD)
    assert not migrate(file, check=False, migrations=STEPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node.yaml", "node.yaml.bak"]


def test_what_cannot_be_written_leaves_no_copy_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(OLD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(Exception, match="No space left"):
            migrate(file, check=False, migrations=STEPS)
    assert file.read_text() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["node.yaml"]
    assert not migrate(file, check=False, migrations=STEPS)
