"""How much of the processors programs other than this node use."""

from __future__ import annotations

from typing import Any

from kwaainet_bridge.node.idle import missing


class CpuReader:
    """Percent of all processors that others have used since it was called last; 0 at first.

    Counted apart is the time of this process and of those that it has started. Calls raise OSError where that cannot be
    read.
    """

    def __init__(self) -> None:
        try:
            import psutil
        except ImportError as e:
            raise missing("psutil", "cpu") from e
        self._psutil: Any = psutil
        self._process = psutil.Process()
        self._before: tuple[float, float, float] | None = None

    def __call__(self) -> float:
        try:
            now = self._times()
        except self._psutil.Error as e:
            raise OSError(0, f"psutil says: {e}") from e
        before, self._before = self._before, now
        if before is None:
            return 0.0
        total, busy, own = (new - old for new, old in zip(now, before, strict=True))
        # a child that has ended takes its time with it, which would count as that of others
        return 0.0 if total <= 0 or own < 0 else min(100.0, max(0.0, 100 * (busy - own) / total))

    def _times(self) -> tuple[float, float, float]:
        """Seconds of all processors together: all, those that were busy, those of this node."""
        times = self._psutil.cpu_times()
        # guests are in user, and nice in guest_nice, too
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy = total - times.idle - getattr(times, "iowait", 0.0)
        own = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                spent = process.cpu_times()
            except self._psutil.Error:  # it has ended just now
                continue
            own += spent.user + spent.system
        ended = self._process.cpu_times()
        own += ended.children_user + ended.children_system
        return total, busy, own
