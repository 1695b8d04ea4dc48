"""Stock Hivemind averagers in one process, each with a DHT and a daemon of its own; driven over stdin and stdout.

Commands::

    start {initial_peers, sizes, seed, prefix,             -> {averager, peer, addresses}; a tensor of random numbers
           compression, options}                              for each size, of NaN if ``seed`` is negative;
                                                              ``options`` are those of DecentralizedAverager
    begin {averager, weight, gather, timeout}              -> null; a step begins
    step  {averager}                                       -> {peer id: gathered} once the step has ended
    values {averager}                                      -> its tensors as lists
    bits  {averager}                                       -> its group bits
    load  {averager}                                       -> {metadata, tensors} from whoever shares them, or null
    kill  {averager}                                       -> null; it and its daemon end without a word to anybody
    shutdown {}                                            -> null, once all have ended

Event: ``ready``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import hivemind
import psutil
import torch
from hivemind import compression as codecs
from hivemind.averaging import DecentralizedAverager
from lines import Lines

lines = Lines()
LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False}
COMPRESSIONS = {
    "NONE": codecs.NoCompression,
    "FLOAT16": codecs.Float16Compression,
    "MEANSTD_16BIT": codecs.ScaledFloat16Compression,
    "UNIFORM_8BIT": codecs.Uniform8BitQuantization,
    "QUANTILE_8BIT": codecs.Quantile8BitQuantization,
    "BLOCKWISE_8BIT": codecs.BlockwiseQuantization,
}


def random_numbers(size: int, seed: int) -> torch.Tensor:
    if seed < 0:
        return torch.full((size,), float("nan"))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Commands:
    def __init__(self) -> None:
        self._averagers: list[Any] = []
        self._steps: dict[int, Any] = {}

    async def start(
        self,
        initial_peers: list[str],
        sizes: list[int],
        seed: int,
        prefix: str,
        *,
        compression: str = "NONE",
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        dht = await asyncio.to_thread(
            hivemind.DHT, initial_peers=initial_peers, start=True, await_ready=True, **LOOPBACK
        )
        averager = DecentralizedAverager(
            [random_numbers(size, seed) for size in sizes],
            dht,
            start=False,
            prefix=prefix,
            compression=COMPRESSIONS[compression](),
            **(options or {}),
        )
        averager.run_in_background(await_ready=False)  # sets a signal handler, so not in a thread
        await asyncio.to_thread(averager.wait_until_ready)
        self._averagers.append(averager)
        return {
            "averager": len(self._averagers) - 1,
            "peer": averager.peer_id.to_base58(),
            "addresses": [str(maddr) for maddr in averager.dht.get_visible_maddrs()],
        }

    async def begin(
        self, averager: int, weight: float | None = None, gather: Any = None, timeout: float = 30.0
    ) -> None:
        stepping = self._averagers[averager].step
        self._steps[averager] = await asyncio.to_thread(
            stepping, weight=weight, gather=gather, timeout=timeout, wait=False
        )

    async def step(self, averager: int) -> dict[str, Any]:
        gathered = await asyncio.to_thread(self._steps.pop(averager).result)
        return {peer.to_base58(): data for peer, data in gathered.items()}

    async def values(self, averager: int) -> list[list[float]]:
        with self._averagers[averager].get_tensors() as tensors:
            return [tensor.tolist() for tensor in tensors]

    async def bits(self, averager: int) -> str:
        return await asyncio.to_thread(self._averagers[averager].get_group_bits)

    async def load(self, averager: int) -> dict[str, Any] | None:
        loaded = await asyncio.to_thread(self._averagers[averager].load_state_from_peers)
        if loaded is None:
            return None
        metadata, tensors = loaded
        return {"metadata": metadata, "tensors": [tensor.tolist() for tensor in tensors]}

    async def kill(self, averager: int) -> None:
        doomed = self._averagers[averager]
        for process in psutil.Process(doomed.dht.pid).children(recursive=True):
            process.kill()
        doomed.kill()

    async def shutdown(self) -> None:
        averagers, self._averagers = self._averagers, []
        for averager in averagers:
            if averager.is_alive():
                await asyncio.to_thread(averager.shutdown)
                await asyncio.to_thread(averager.dht.shutdown)
            else:
                averager.dht.kill()


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    commands = Commands()
    running: set[asyncio.Task[None]] = set()

    async def run(request: dict[str, Any]) -> None:
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(commands, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)

    lines.event("ready")
    while line := await reader.readline():
        task = asyncio.create_task(run(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await commands.shutdown()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
