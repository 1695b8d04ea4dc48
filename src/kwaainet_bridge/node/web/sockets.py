"""The sockets of what a node serves: made so that nobody else can use it, and found again by clients."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.errors import ConfigError

_BACKLOG: Final = 32
_LONGEST_PATH: Final = 107
"""What Linux and others have room for in the address of such a socket, in bytes."""


@contextmanager
def listening(address: UnixAddress | TcpAddress, *, key: str) -> Iterator[socket.socket]:
    """Listen there within the block; the file of a socket is made for its owner alone, and removed at the end.

    A file that a crashed node has left is replaced. ``key`` is the configuration's, for errors. Raises ConfigError if
    somebody else listens there, for a file that is no socket, or where none can be made.
    """
    with _bound_unix(address, key) if isinstance(address, UnixAddress) else _bound_tcp(address, key) as bound:
        bound.listen(_BACKLOG)
        bound.setblocking(False)
        yield bound


@contextmanager
def _bound_tcp(address: TcpAddress, key: str) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((address.host, address.port))
        except OSError as e:
            raise ConfigError(
                f"{key}: {address} cannot be listened on: {e.strerror}; choose another port, or unix"
            ) from e
        yield bound


@contextmanager
def _bound_unix(address: UnixAddress, key: str) -> Iterator[socket.socket]:
    path = address.path
    assert path is not None
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(
            f"{key}: this system has no sockets in the file system: set {key} to a port of this machine, as in "
            "127.0.0.1:9464, or to off"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        try:
            _remove_left(path, key)
            with reachable(path) as name, _for_its_owner(bound):
                bound.bind(name)
            path.chmod(0o600)
            made = path.lstat().st_ino
        except OSError as e:
            raise ConfigError(
                f"{key}: no socket can be made at {path}: {e.strerror or e}; "
                "name another path (unix:<path>), or off"
            ) from e
        try:
            yield bound
        finally:
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == made:
                    path.unlink()


@contextmanager
def _for_its_owner(bound: socket.socket) -> Iterator[None]:
    """The file that is made within the block is its owner's alone: at no time can others connect."""
    try:
        os.fchmod(bound.fileno(), 0o600)  # Linux makes the file with the mode of the socket
    except (AttributeError, OSError):  # macOS and others know no mode of a socket
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)
    else:
        yield


def _remove_left(path: Path, key: str) -> None:
    """Remove the socket of a node that is gone. Raises ConfigError for one in use, and for what is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{key}: {path} exists and is no socket: name another path (unix:<path>)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, reachable(path) as name:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its queue is full
            pass
    raise ConfigError(
        f"{key}: another program listens at {path}: stop it, or name another path (unix:<path>)"
    )


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name of ``path`` that is short enough for the address of a socket, within the block.

    Raises OSError where there is none.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(0, "this system has no sockets in the file system: set admin.listen to a port")
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY) if hasattr(os, "O_PATH") else -1
    if folder < 0:
        raise OSError(0, f"its path is longer than {_LONGEST_PATH} bytes")
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
