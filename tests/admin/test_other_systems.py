"""What a node does on systems that lack what Linux has: their parts are taken away here, none of them was used."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.cli import run
from kwaainet_bridge.cli.run import _hangup, _has_terminal
from kwaainet_bridge.engine.weights.locks import lock_alone, lock_shared
from kwaainet_bridge.errors import CheckpointError, ConfigError
from kwaainet_bridge.node.web.sockets import listening, reachable


@pytest.mark.slow
def test_all_is_imported_without_what_unix_alone_has():
    """Windows' Python has neither module."""
    program = (
        "import sys, psutil; "  # which has a part of its own for each system
        "sys.modules['resource'] = sys.modules['fcntl'] = None; "
        "import kwaainet_bridge.cli.app, kwaainet_bridge.node.daemon, kwaainet_bridge.engine; print('imported')"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr


def test_without_sockets_in_the_file_system_a_port_is_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    with (
        pytest.raises(
            ConfigError, match=r"admin\.listen: this system has no sockets .* 127\.0\.0\.1:9464, or to off"
        ),
        listening(UnixAddress(tmp_path / "node.sock"), key="admin.listen"),
    ):
        pass
    with pytest.raises(OSError, match=r"set admin\.listen to a port"), reachable(tmp_path / "node.sock"):
        pass
    with listening(TcpAddress("127.0.0.1", 0), key="admin.listen"):
        pass


def test_without_terminals_of_unix_a_node_has_none(monkeypatch):
    monkeypatch.delattr(os, "O_NOCTTY")
    monkeypatch.setattr(run, "HANGUP", None)
    assert not _has_terminal()
    assert _hangup() == []


def no_mode(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("lacks", ["the call", "a mode of sockets"])
def test_a_socket_is_for_its_owner_alone_where_it_has_no_mode_before(tmp_path: Path, monkeypatch, lacks: str):
    if lacks == "the call":
        monkeypatch.delattr(os, "fchmod")
    else:
        monkeypatch.setattr(os, "fchmod", no_mode)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)  # it is so from the first moment, not afterwards
    address = UnixAddress(tmp_path / "node.sock")
    before = os.umask(0)
    try:
        with listening(address, key="admin.listen"):
            assert (tmp_path / "node.sock").stat().st_mode & 0o777 == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_without_locks_weights_are_not_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp_path / "used").open("wb") as file:
        for lock in (lambda: lock_shared(file.fileno()), lambda: lock_alone(file)):
            with pytest.raises(CheckpointError, match=r"give model\.name the folder of a checkpoint"):
                lock()


def test_locks(tmp_path: Path):
    used = tmp_path / "used"
    with used.open("wb") as one, used.open("wb") as two, used.open("wb") as three:
        lock_shared(one.fileno())
        lock_shared(two.fileno())
        assert not lock_alone(three)
        one.close()
        assert not lock_alone(three)
        two.close()
        assert lock_alone(three)
