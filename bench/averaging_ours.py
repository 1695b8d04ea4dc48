"""One of our averagers of the averaging benchmark, driven over stdin and stdout (net_lines.py)::

    open  {initial_peers, elements, prefix, compression, group}   -> addresses of the peer
    fill  {seed}                                                  -> null; the tensor gets new random numbers
    sample {}                                                     -> about a thousand of its values
    step  {}                                                      -> seconds and bytes of one step, see below
    profile {on}                                                  -> null; when switched off, where the time went

``averaging_stock.py`` has the first four. A step answers ``{"step": seconds from asking to result, "reduce": seconds of
the all-reduce, "peak": bytes}``; ``peak`` is the most memory that the process had during the step less what it had
before.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import trio
import trio.lowlevel

from bench.net_lines import Lines, requests
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging import Averager
from kwaainet_bridge.hivemind.peer import open_peer
from kwaainet_bridge.malloc import keep_freed_memory
from kwaainet_bridge.net.identity import Identity

STEP_SECONDS = 120.0
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PROFILE_LINES = 40
_SELF = Path("/proc/self")


class TimedAverager(Averager):
    """Remembers how long the last all-reduce took, from the group's beginning to changed tensors."""

    reduce_seconds = 0.0

    async def _average(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return await super()._average(*arguments, **options)
        finally:
            self.reduce_seconds = time.perf_counter() - began


class Commands:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._tensor = torch.empty(0)
        self._averager: TimedAverager | None = None
        self._profile = cProfile.Profile(time.thread_time)

    async def open(
        self, initial_peers: list[str], elements: int, prefix: str, compression: str, group: int
    ) -> list[str]:
        self._tensor = torch.zeros(elements)
        enter = self._stack.enter_async_context
        identity = Identity.generate("ed25519")
        peer = await enter(open_peer(initial_peers, identity=identity, listen=[LOOPBACK]))
        self._averager = TimedAverager(
            peer,
            [self._tensor],
            prefix=prefix,
            kind="DecentralizedAverager",
            target_group_size=group,
            compression=CompressionType[compression],
        )
        await enter(self._averager)
        return peer.host.addresses()

    async def fill(self, seed: int) -> None:
        await trio.lowlevel.checkpoint()
        self._tensor.normal_(generator=torch.Generator().manual_seed(seed))

    async def step(self) -> dict[str, float]:
        assert self._averager is not None
        (_SELF / "clear_refs").write_text("5")  # the high-water mark begins anew: proc(5)
        before = _memory("VmRSS")
        began = time.perf_counter()
        await self._averager.step(timeout=STEP_SECONDS)
        seconds = time.perf_counter() - began
        peak = _memory("VmHWM") - before
        return {"step": seconds, "reduce": self._averager.reduce_seconds, "peak": peak}

    async def sample(self) -> list[float]:
        await trio.lowlevel.checkpoint()
        return self._tensor[:: max(1, len(self._tensor) // 1000)].tolist()

    async def profile(self, on: bool) -> str | None:
        await trio.lowlevel.checkpoint()
        if on:
            self._profile.enable()
            return None
        self._profile.disable()
        text = io.StringIO()
        pstats.Stats(self._profile, stream=text).sort_stats("tottime").print_stats(PROFILE_LINES)
        return text.getvalue()


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


async def main() -> None:
    torch.set_num_threads(1)  # as the stock peers
    keep_freed_memory()  # as the command does, and the documentation advises
    lines = Lines()
    async with AsyncExitStack() as stack:
        commands = Commands(stack)
        lines.event("ready")
        async for request in requests():
            arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
            try:
                lines.result(request, await getattr(commands, request["do"])(**arguments))
            except Exception as e:  # told to the benchmark
                lines.error(request, e)


if __name__ == "__main__":
    trio.run(main)
