"""How much of the GPUs programs other than this node use, as NVIDIA's driver tells it."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.idle import missing

_FIRST_NAMESPACE: Final = 0xEFFFFFFC
"""The inode of Linux' own namespace of process ids."""


class GpuReader:
    """Percent that others have used of the busiest of these GPUs since it was called last.

    ``uuids`` gives the names of the GPUs by which the driver knows them, at the first call; none stands for all. What
    the processes ``own`` use is left out: this one, and those that share its models. Calls raise OSError where the
    driver does not tell. Raises ConfigError where there is no driver, or where it cannot tell which processes are this
    node's.
    """

    def __init__(
        self,
        uuids: Callable[[], Sequence[str]],
        *,
        own: Callable[[], set[int]] | None = None,
        namespace: Callable[[], int | None] | None = None,
    ) -> None:
        try:
            import pynvml
        except ImportError as e:
            raise missing("nvidia-ml-py", "gpu") from e
        self._nvml: Any = pynvml
        if (namespace or _namespace)() not in (None, _FIRST_NAMESPACE):
            raise ConfigError(
                "idle.watch: in a container the driver's process ids are not those seen here, so the use of gpu by "
                "this node cannot be told from that of others: set idle.watch to off, or to cpu, or share the "
                "machine's process ids with the container"
            )
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as e:
            raise ConfigError(
                f"idle.watch: NVIDIA's driver does not answer ({e}): install it, or set idle.watch to cpu or off"
            ) from e
        self._uuids = uuids
        self._own = own or _own_processes
        self._handles: list[Any] = []
        self._seen: dict[int, int] = defaultdict(int)

    def __call__(self) -> float:
        try:
            if not self._handles:
                self._handles = self._find()
            own = self._own()
            return max(self._of_others(index, handle, own) for index, handle in enumerate(self._handles))
        except self._nvml.NVMLError as e:
            raise OSError(0, f"NVIDIA's driver says: {e}") from e

    def _find(self) -> list[Any]:
        nvml = self._nvml
        if names := self._uuids():
            return [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        if not handles:
            raise OSError(0, "there is no GPU")
        return handles

    def _of_others(self, index: int, handle: Any, own: set[int]) -> float:
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(handle, self._seen[index])
        except self._nvml.NVMLError_NotFound:  # nobody has used it since
            return 0.0
        by_process: dict[int, list[int]] = defaultdict(list)
        for sample in samples:
            self._seen[index] = max(self._seen[index], sample.timeStamp)
            if sample.pid not in own and sample.timeStamp:
                by_process[sample.pid].append(sample.smUtil)
        return min(100.0, sum(sum(values) / len(values) for values in by_process.values()))


def _own_processes() -> set[int]:
    return {os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)}


def _namespace() -> int | None:
    """The namespace of this process' ids; None where there are no such."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None


def uuids_of(indexes: Sequence[int]) -> list[str]:
    """What the driver calls the GPUs that torch has by these numbers. Raises OSError."""
    if not indexes:
        return []
    import torch

    try:
        return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indexes]
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise OSError(0, f"torch does not tell which GPUs it uses: {e}") from e
