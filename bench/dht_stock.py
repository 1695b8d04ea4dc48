"""Stock Hivemind's nodes of the DHT benchmark, driven like ``dht_ours.py``. Runs in the stock environment."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock"))

from hivemind.dht import DHTNode
from hivemind.utils import get_dht_time
from hivemind.utils.asyncio import switch_to_uvloop
from lines import Lines

LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False}
TTL = 300


class Swarm:
    def __init__(self) -> None:
        self.nodes: dict[int, DHTNode] = {}

    async def open(self, count: int, initial: int) -> None:
        addresses: list[Any] = []
        for number in range(count):
            node = await DHTNode.create(initial_peers=addresses[:initial], wait_timeout=5, **LOOPBACK)
            self.nodes[number] = node
            if len(addresses) < initial:
                addresses += (await node.get_visible_maddrs())[:1]

    async def run(self, jobs: list[dict[str, Any]], parallel: int) -> dict[str, Any]:
        done = [0.0] * len(jobs)
        left = iter(enumerate(jobs))
        began = time.perf_counter()

        async def work() -> None:
            for number, job in left:
                if job["do"] == "kill":
                    self.nodes.pop(job["node"]).p2p._child.kill()  # noqa: SLF001 - no other way to end it at once
                    continue
                nodes = [n for n in job["nodes"] if n in self.nodes]
                parts = await asyncio.gather(*(call(self.nodes[n], n, job) for n in nodes))
                counted = sum(part for n, part in zip(nodes, parts, strict=True) if n in job["counted"])
                done[number] = counted / len(job["counted"])

        await asyncio.gather(*(work() for _ in range(parallel)))
        return {"seconds": time.perf_counter() - began, "done": done}

    async def close(self) -> None:
        for node in self.nodes.values():
            await node.shutdown()
        self.nodes.clear()


async def call(node: DHTNode, number: int, job: dict[str, Any]) -> float:
    if job["do"] == "store":
        ok = await node.store(job["key"], number, get_dht_time() + TTL, subkey=f"peer {number}")
        return float(bool(ok))
    found = await node.get(job["key"], latest=True)
    return 0.0 if found is None else len(set(found.value) & set(job["subkeys"])) / len(job["subkeys"])


async def main() -> None:
    lines = Lines()
    swarm = Swarm()
    lines.event("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(swarm, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)
    await swarm.close()
    os._exit(0)


if __name__ == "__main__":
    switch_to_uvloop()
    asyncio.run(main())
