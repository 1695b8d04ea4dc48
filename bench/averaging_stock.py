"""One stock averager of the averaging benchmark, driven like ``averaging_ours.py``. Runs in the stock environment.

Hivemind's code runs as it is; ``_aggregate_with_group``, which is the all-reduce in the averager's own process, is
timed from outside. Memory is measured by the benchmark, as a stock peer is several processes.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock"))

import hivemind
import torch
from hivemind import compression as codecs
from hivemind.averaging import DecentralizedAverager
from lines import Lines

LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False}
COMPRESSIONS = {
    "NONE": codecs.NoCompression,
    "FLOAT16": codecs.Float16Compression,
    "BLOCKWISE_8BIT": codecs.BlockwiseQuantization,
}
STEP_SECONDS = 120.0
PATIENCE = {"next_chunk_timeout": 15.0, "allreduce_timeout": 60.0}
"""What Hivemind's optimizers set. Without it a stream that the daemon cuts off stops a group for good."""

reduce_seconds = multiprocessing.Value(
    "d", 0.0
)  # written by the averager's process, which is forked from this one
_aggregate = DecentralizedAverager._aggregate_with_group  # noqa: SLF001 - the all-reduce alone has no public name


async def _timed(self: DecentralizedAverager, *arguments: Any, **options: Any) -> Any:
    began = time.perf_counter()
    try:
        return await _aggregate(self, *arguments, **options)
    finally:
        reduce_seconds.value = time.perf_counter() - began


DecentralizedAverager._aggregate_with_group = _timed  # noqa: SLF001


class Commands:
    def __init__(self) -> None:
        self._averager: Any = None

    async def open(
        self, initial_peers: list[str], elements: int, prefix: str, compression: str, group: int
    ) -> list[str]:
        some = torch.ones(8)  # bitsandbytes crashes on zeros
        COMPRESSIONS[compression]().compress(
            some, codecs.CompressionInfo.from_tensor(some)
        )  # loads libraries
        dht = await asyncio.to_thread(
            hivemind.DHT, initial_peers=initial_peers, start=True, await_ready=True, **LOOPBACK
        )
        self._averager = DecentralizedAverager(
            [torch.zeros(elements)],
            dht,
            start=False,
            prefix=prefix,
            compression=COMPRESSIONS[compression](),
            target_group_size=group,
            **PATIENCE,
        )
        self._averager.run_in_background(await_ready=False)  # sets a signal handler, so not in a thread
        await asyncio.to_thread(self._averager.wait_until_ready)
        return [str(maddr) for maddr in dht.get_visible_maddrs()]

    async def fill(self, seed: int) -> None:
        with self._averager.get_tensors() as (tensor,):
            tensor.normal_(generator=torch.Generator().manual_seed(seed))

    async def step(self) -> dict[str, float]:
        began = time.perf_counter()
        await asyncio.to_thread(self._averager.step, timeout=STEP_SECONDS)
        return {"step": time.perf_counter() - began, "reduce": reduce_seconds.value}

    async def sample(self) -> list[float]:
        with self._averager.get_tensors() as (tensor,):
            return tensor[:: max(1, len(tensor) // 1000)].tolist()


async def main() -> None:
    torch.set_num_threads(1)
    lines = Lines()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    commands = Commands()
    lines.event("ready")
    while line := await reader.readline():
        request = json.loads(line)
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(commands, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
