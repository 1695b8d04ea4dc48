"""How much memory is left for another span of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from kwaainet_bridge import defaults

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


def available_bytes(device: str) -> int | None:
    """Bytes that this process may still take on a torch device; None where nobody tells.

    For a CUDA device what the driver calls free. On the CPU what Linux calls available, or what a control group leaves.
    """
    if device.startswith("cuda"):
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    return available_ram() if device == "cpu" else None


def release(device: str) -> None:
    """Give back what torch keeps of freed memory on a CUDA device, so that it counts as free."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def available_ram(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """``MemAvailable`` of Linux, or the room that the tightest control group around this process leaves."""
    try:
        told = (proc / "meminfo").read_text()
        available = next(line for line in told.splitlines() if line.startswith("MemAvailable:"))
        room = int(available.split()[1]) * defaults.KIB
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return min([room, *_rooms_in_groups(proc, cgroups)])


def _rooms_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _rooms(cgroups, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms(cgroups / "memory", path, *names)


def _rooms(root: Path, path: str, limit: str, usage: str, inactive: str) -> Iterator[int]:
    """What each group from ``path`` up to the root leaves. A container sees only the upper end of its path."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # pages of files go when memory is needed: weights that were just read are such
            yield max(0, most - used + int(stat[inactive]))
        except (OSError, ValueError, KeyError):  # no limit, "max", or nothing of that name
            continue
