"""Stock ``hivemind.Optimizer`` peers in one process, each with a DHT and a daemon of its own, training one small model.

Commands::

    start {initial_peers, number, seed, run,          -> {addresses}; a peer with the model of ``seed``, and the
           batch_seconds, options}                       batches of ``number``; ``options`` are those of the Optimizer
    train {number, epochs}                            -> null; a thread trains until then
    state {number}                                    -> {epoch, peers, loss, weights, alive, ends, rate}
    load  {number}                                    -> null; it takes the state from others
    leave {number}                                    -> null, once it has shut down
    shutdown {}                                       -> null, once all have

Event: ``ready``.

``training_problem.py`` has the model and the data, which the peers of this package have, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.utils.crypto import RSAPrivateKey
from lines import Lines

sys.path.append(str(Path(__file__).resolve().parents[1]))
from training_problem import Batches, loss_of, make_model, make_optimizer, make_scheduler, weights_of

lines = Lines()
LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False}


class Peer:
    def __init__(self, number: int, seed: int, batch_seconds: float) -> None:
        self.number = number
        self.model = make_model(seed)
        self.batches = Batches(number)
        self.batch_seconds = batch_seconds
        self.ends: list[float] = []
        self.thread: threading.Thread | None = None
        self.stopping = False
        self.dht: Any = None
        self.optimizer: Any = None

    def start(self, initial_peers: list[str], run: str, options: dict[str, Any]) -> list[str]:
        self.dht = hivemind.DHT(initial_peers=initial_peers, start=True, await_ready=True, **LOOPBACK)
        # peers of one process would share a key, by which each would overwrite the other's report
        tracker_opts = {"private_key": RSAPrivateKey()}
        torch_optimizer = make_optimizer(self.model.parameters())
        self.optimizer = hivemind.Optimizer(
            dht=self.dht,
            run_id=run,
            optimizer=torch_optimizer,
            scheduler=make_scheduler(torch_optimizer),
            batch_size_per_step=self.batches.size,
            tracker_opts=tracker_opts,
            **options,
        )
        return [str(maddr) for maddr in self.dht.get_visible_maddrs()]

    def train(self, epochs: int) -> None:
        while self.optimizer.local_epoch < epochs and not self.stopping:
            began, epoch = time.monotonic(), self.optimizer.local_epoch
            self.optimizer.zero_grad()
            self.batches.loss(self.model).backward()
            self.optimizer.step()
            if self.optimizer.local_epoch != epoch:
                self.ends.append(time.time())
            time.sleep(max(0.0, self.batch_seconds - (time.monotonic() - began)))

    def leave(self) -> None:
        self.stopping = True
        if self.thread is not None:
            self.thread.join(60)
        self.optimizer.shutdown()
        self.dht.shutdown()


class Commands:
    def __init__(self) -> None:
        self._peers: dict[int, Peer] = {}

    def start(
        self,
        *,
        initial_peers: list[str],
        number: int,
        seed: int,
        run: str,
        batch_seconds: float,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        peer = Peer(number, seed, batch_seconds)
        addresses = peer.start(initial_peers, run, options)
        self._peers[number] = peer
        return {"addresses": addresses}

    def train(self, number: int, epochs: int) -> None:
        peer = self._peers[number]
        peer.thread = threading.Thread(target=peer.train, args=(epochs,), daemon=True)
        peer.thread.start()

    def state(self, number: int) -> dict[str, Any]:
        peer = self._peers[number]
        return {
            "epoch": peer.optimizer.local_epoch,
            "peers": peer.optimizer.tracker.global_progress.num_peers,
            "loss": loss_of(peer.model),
            "weights": weights_of(peer.model),
            "alive": peer.thread is not None and peer.thread.is_alive(),
            "ends": peer.ends,
            "rate": peer.optimizer.opt.param_groups[0]["lr"],
        }

    def load(self, number: int) -> None:
        self._peers[number].optimizer.load_state_from_peers()

    def leave(self, number: int) -> None:
        self._peers.pop(number).leave()

    def shutdown(self) -> None:
        leaving = [threading.Thread(target=peer.leave) for peer in self._peers.values()]
        self._peers.clear()
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()


async def main() -> None:
    torch.set_num_threads(1)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    commands = Commands()
    running: set[asyncio.Task[None]] = set()

    async def run(request: dict[str, Any]) -> None:
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        method = getattr(commands, request["do"])
        try:
            # averagers set signal handlers as they start, so not in a thread
            answer = (
                method(**arguments)
                if request["do"] == "start"
                else await asyncio.to_thread(method, **arguments)
            )
            lines.result(request, answer)
        except Exception as e:
            lines.error(request, e)

    lines.event("ready")
    while line := await reader.readline():
        task = asyncio.create_task(run(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.to_thread(commands.shutdown)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
