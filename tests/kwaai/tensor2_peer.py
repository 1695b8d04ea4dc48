"""A process that receives tensors and tells how much memory that took: ``python tensor2_peer.py``.

Writes its address, and for each tensor a line of JSON: name, a checksum, the process's largest resident memory since
the last one, and what was resident before, in bytes. Ends with its stdin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import trio

from kwaainet_bridge.kwaai.server import KwaaiProtocols, serve_kwaai
from kwaainet_bridge.kwaai.tensor2 import TensorInbox
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcServer


def resident(which: str) -> int:
    """VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise AssertionError(which)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def main() -> None:
    torch.set_num_threads(1)
    before = 0

    async def want(peer, offer) -> None:
        nonlocal before
        forget_peak()
        before = resident("VmRSS")

    async def take(peer, offer, tensor) -> None:
        peak = resident("VmHWM")
        tell(name=offer.name, sum=tensor.double().sum().item(), before=before, peak=peak)

    config = HostConfig(identity=Identity.generate("ed25519"), listen=("/ip4/127.0.0.1/tcp/0",))
    async with (
        open_host(config) as host,
        serve_kwaai(host, RpcServer(host), KwaaiProtocols(tensor2=TensorInbox(want=want, take=take))),
    ):
        tell(address=host.addresses()[0])
        await trio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    trio.run(main)
