"""The memory that is left, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kwaainet_bridge.node.memory import available_bytes, available_ram

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    return folder


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def version_2(folder: Path, most: str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_what_linux_calls_available(proc: Path, groups: Path) -> None:
    assert available_ram(proc, groups) == 8 * GIB


def test_the_tightest_group_decides(proc: Path, groups: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/system.slice/node.service\n")
    version_2(groups / "system.slice" / "node.service", "max", 3 * GIB)
    version_2(groups / "system.slice", str(4 * GIB), 3 * GIB, GIB // 2)
    assert available_ram(proc, groups) == GIB + GIB // 2
    version_2(groups / "system.slice" / "node.service", str(3 * GIB), 3 * GIB + 1)
    assert available_ram(proc, groups) == 0
    version_2(groups / "system.slice" / "node.service", str(100 * GIB), 0)
    version_2(groups / "system.slice", "max", 0)
    assert available_ram(proc, groups) == 8 * GIB


def test_in_a_container_only_the_upper_end_of_the_path_is_there(proc: Path, groups: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/docker/0123\n0::/\n")
    root = groups / "memory"
    root.mkdir()
    (root / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (root / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (root / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 1024\n")
    assert available_ram(proc, groups) == GIB + 1024


@pytest.mark.parametrize("meminfo", [None, "", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_a_system_that_does_not_tell(proc: Path, groups: Path, meminfo: str | None) -> None:
    (proc / "meminfo").unlink()
    if meminfo is not None:
        (proc / "meminfo").write_text(meminfo)
    assert available_ram(proc, groups) is None


def test_this_machine_and_devices_of_which_nobody_tells() -> None:
    left = available_bytes("cpu")
    assert left is None or left > 0
    assert available_bytes("mps") is None
