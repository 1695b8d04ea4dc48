"""Stock Hivemind averagers in one process, each with a DHT and a daemon of its own; driven over stdin and stdout.

Commands::

    start {initial_peers, sizes, seed, prefix,             -> {averager, peer, addresses}; a tensor of random numbers
           compression, held, options}                        for each size, of NaN if ``seed`` is negative; one that is
                                                              ``held`` joins groups, then sends and averages nothing;
                                                              ``options`` are those of DecentralizedAverager
    renew {averager, seed, settings}                       -> null; other numbers in its tensors, another size of
                                                              group, compression, bandwidth (see ``renew``)
    begin {averager, weight, gather, timeout, retries}     -> null; a step begins
    step  {averager}                                       -> {peer id: gathered} once the step has ended
    cancel {}                                              -> null; whatever steps have begun are over
    values {averager}                                      -> its tensors as lists
    shares {averager}                                      -> {peer id: elements} that each member was to average, as
                                                              this one computed them for its last group
    bits  {averager}                                       -> its group bits
    share {averager, allowed, priority}                    -> null; whether it gives its state to others
    load  {averager, timeout}                              -> {metadata, tensors} from whoever shares them, or null
    kill  {averager}                                       -> null; it and its daemon end without a word to anybody
    shutdown {}                                            -> null, once all have ended

Event: ``ready``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

import hivemind
import psutil
import torch
from hivemind import compression as codecs
from hivemind.utils import MPFuture
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


class DecentralizedAverager(hivemind.averaging.DecentralizedAverager):
    """Can be asked what it did, and used again with other settings. Its calls carry the name of its class."""

    held = False
    _last_shares: dict[str, int] | None = None

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method in the averager's own process."""
        future = MPFuture()
        self._outer_pipe.send((method, [], {"future": future, **arguments}))
        return future.result(timeout=10)

    async def _renew(
        self,
        *,
        size: int,
        least_size: int,
        matchmaking_time: float,
        request_timeout: float,
        compression: str,
        chunk_timeout: float | None,
        future: Any,
    ) -> None:
        matchmaking = self._matchmaking
        for part in (matchmaking, matchmaking.potential_leaders, matchmaking.group_key_manager):
            part.target_group_size = size
        matchmaking.min_group_size = least_size
        matchmaking.request_timeout = request_timeout
        for part in (matchmaking, matchmaking.potential_leaders):
            part.min_matchmaking_time = matchmaking_time
        self.allreduce_kwargs |= {
            "compression": COMPRESSIONS[compression](),
            "sender_timeout": chunk_timeout,
            "reducer_timeout": chunk_timeout and 2 * chunk_timeout,
        }
        future.set_result(None)

    async def _shares(self, *, future: Any) -> None:
        future.set_result(self._last_shares)

    async def _run_allreduce_inplace_(
        self, tensors: Any, group_info: Any, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        self._last_shares = {
            peer.to_base58(): int(share)
            for peer, share in zip(group_info.peer_ids, kwargs["peer_fractions"], strict=True)
        }
        if self.held:
            await asyncio.Event().wait()
        await super()._run_allreduce_inplace_(tensors, group_info, group_id, **kwargs)


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
        held: bool = False,
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
        averager.held = held
        averager.run_in_background(await_ready=False)  # sets a signal handler, so not in a thread
        await asyncio.to_thread(averager.wait_until_ready)
        self._averagers.append(averager)
        return {
            "averager": len(self._averagers) - 1,
            "peer": averager.peer_id.to_base58(),
            "addresses": [str(maddr) for maddr in averager.dht.get_visible_maddrs()],
        }

    async def renew(
        self,
        averager: int,
        seed: int,
        *,
        bandwidth: float | None,
        **settings: Any,
    ) -> None:
        """``settings`` are all those of ``_renew``; ``chunk_timeout`` is ``next_chunk_timeout``."""
        renewed = self._averagers[averager]
        renewed.bandwidth = bandwidth
        renewed.matchmaking_kwargs["min_matchmaking_time"] = settings["matchmaking_time"]
        await asyncio.to_thread(renewed.ask, "_renew", **settings)
        with renewed.get_tensors() as tensors:
            for tensor in tensors:
                tensor.copy_(random_numbers(tensor.numel(), seed))

    async def begin(
        self,
        averager: int,
        weight: float | None = None,
        gather: Any = None,
        timeout: float = 30.0,
        *,
        retries: bool = True,
    ) -> None:
        stepping = self._averagers[averager].step
        self._steps[averager] = await asyncio.to_thread(
            stepping, weight=weight, gather=gather, timeout=timeout, allow_retries=retries, wait=False
        )

    async def cancel(self) -> None:
        steps, self._steps = self._steps, {}
        for step in steps.values():
            step.cancel()
        for step in steps.values():
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.to_thread(step.result)

    async def step(self, averager: int) -> dict[str, Any]:
        gathered = await asyncio.to_thread(self._steps.pop(averager).result)
        return {peer.to_base58(): data for peer, data in gathered.items()}

    async def values(self, averager: int) -> list[list[float]]:
        with self._averagers[averager].get_tensors() as tensors:
            return [tensor.tolist() for tensor in tensors]

    async def shares(self, averager: int) -> dict[str, int] | None:
        shares: dict[str, int] | None = await asyncio.to_thread(self._averagers[averager].ask, "_shares")
        return shares

    async def share(self, averager: int, priority: float = 0.0, *, allowed: bool) -> None:
        self._averagers[averager].allow_state_sharing = allowed
        self._averagers[averager].state_sharing_priority = priority

    async def bits(self, averager: int) -> str:
        return await asyncio.to_thread(self._averagers[averager].get_group_bits)

    async def load(self, averager: int, timeout: float | None = None) -> dict[str, Any] | None:
        loading = self._averagers[averager].load_state_from_peers
        loaded = await asyncio.to_thread(loading, timeout=timeout)
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
