"""Our nodes of the DHT benchmark, all in this process, driven over stdin and stdout (net_lines.py)::

    open  {count, initial}    -> null, once all nodes have joined through the first ``initial``
    run   {jobs, parallel}    -> {"seconds": in all, "done": for each job the part that succeeded}
    close {}                  -> null

A job is ``{"do": "store", "key", "nodes", "counted"}``: each of the nodes stores its subkey, and those in ``counted``
matter for the result; ``{"do": "get", "key", "nodes", "counted", "subkeys"}``: each reads the latest and looks for the
subkeys; or ``{"do": "kill", "node"}``.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import trio
import trio.lowlevel

from bench.net_lines import Lines, requests
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer

TTL = 300


class Swarm:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nodes: dict[int, DhtNode] = {}
        self.ends: dict[int, trio.Event] = {}
        self._nursery = nursery

    async def _live(self, number: int, addresses: list[str], task_status: trio.TaskStatus[list[str]]) -> None:
        async with open_host(HostConfig(identity=Identity.generate("ed25519"))) as host:
            node = DhtNode(host, RpcServer(host), RpcClient(host))
            async with node.running():
                results = await node.bootstrap([await host.connect(address) for address in addresses])
                if not all(result.ok for result in results):
                    raise RuntimeError(str(results))
                self.nodes[number] = node
                end = self.ends[number] = trio.Event()
                task_status.started(host.addresses())
                await end.wait()

    async def open(self, count: int, initial: int) -> None:
        addresses: list[str] = []
        for number in range(count):
            own = await self._nursery.start(self._live, number, addresses[:initial])
            addresses += own[:1]

    def kill(self, node: int) -> None:
        del self.nodes[node]
        self.ends.pop(node).set()

    async def run(self, jobs: list[dict[str, Any]], parallel: int) -> dict[str, Any]:
        done = [0.0] * len(jobs)
        left = iter(enumerate(jobs))
        began = time.perf_counter()

        async def call(node: DhtNode, number: int, place: int, job: dict[str, Any]) -> None:
            with contextlib.suppress(NetworkError):  # it was killed
                part = await _call(node, number, job)
                if number in job["counted"]:
                    done[place] += part / len(job["counted"])

        async def work() -> None:
            for place, job in left:
                if job["do"] == "kill":
                    self.kill(job["node"])
                    continue
                async with trio.open_nursery() as calls:
                    for number in job["nodes"]:
                        if number in self.nodes:
                            calls.start_soon(call, self.nodes[number], number, place, job)

        async with trio.open_nursery() as nursery:
            for _ in range(parallel):
                nursery.start_soon(work)
        return {"seconds": time.perf_counter() - began, "done": done}

    async def close(self) -> None:
        for number in list(self.nodes):
            self.kill(number)
        await trio.lowlevel.checkpoint()


async def _call(node: DhtNode, number: int, job: dict[str, Any]) -> float:
    if job["do"] == "store":
        stored = await node.store(job["key"], number, time.time() + TTL, subkey=f"peer {number}")
        return float(stored.ok)
    found = await node.get(job["key"])
    if found is None:
        return 0.0
    return len(set(found.value) & set(job["subkeys"])) / len(job["subkeys"])


async def main() -> None:
    lines = Lines()
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery)
        lines.event("ready")
        async for request in requests():
            arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
            try:
                lines.result(request, await getattr(swarm, request["do"])(**arguments))
            except Exception as e:  # told to the benchmark
                lines.error(request, e)
        await swarm.close()


if __name__ == "__main__":
    trio.run(main)
