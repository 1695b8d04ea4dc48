"""Locks of files that several processes use: whoever reads one keeps the others from removing it."""

from __future__ import annotations

from types import ModuleType
from typing import BinaryIO

from kwaainet_bridge.errors import CheckpointError


def lock_shared(descriptor: int) -> None:
    """Hold a lock, together with others, until the file is closed. Raises OSError, or CheckpointError without locks."""
    fcntl = _locks_of_unix()
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def lock_alone(file: BinaryIO) -> bool:
    """Whether nobody else holds a lock; then this one is held until the file is closed. Raises as above."""
    fcntl = _locks_of_unix()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locks_of_unix() -> ModuleType:
    try:
        import fcntl
    except ImportError:
        raise CheckpointError(
            "weights of hub repositories cannot be kept here: this system has no locks (flock) that tell which files "
            "are in use; give model.name the folder of a checkpoint, or use Linux, macOS or WSL2"
        ) from None
    return fcntl
