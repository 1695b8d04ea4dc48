"""A stock Hivemind expert server with an expert for each compression: ``codec.N`` answers under compression N.

Every expert returns its input, so what a caller gets back went through the stock decoder of the request and the
stock encoder of the answer. It has no commands; it ends with its input. Event: ``ready {peer, addresses}``.
"""

from __future__ import annotations

import os
import sys

import torch
from hivemind.dht import DHT
from hivemind.moe.server import ModuleBackend, Server
from hivemind.moe.server.dht_handler import DHTHandlerThread
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from lines import Lines

HIDDEN = 512


def expert(compression: int) -> ModuleBackend:
    tensor = BatchTensorDescriptor(HIDDEN, compression=compression)
    return ModuleBackend(
        f"codec.{compression}",
        torch.nn.Identity(),
        args_schema=(tensor,),
        outputs_schema=tensor,
        max_batch_size=1 << 14,
    )


class LateDeclaration(DHTHandlerThread):
    """Declares the experts once the server is ready. The stock thread does while the server forks its handlers and
    pools, and one that is forked while the thread holds a lock never starts.
    """

    server: Server

    def run(self) -> None:
        self.server.ready.wait()
        super().run()


def main() -> None:
    lines = Lines()
    dht = DHT(host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True, use_ipfs=False)
    experts = [expert(compression) for compression in CompressionType.values()]
    server = Server(dht, {e.name: e for e in experts}, num_connection_handlers=1, device="cpu")
    server.dht_handler_thread = LateDeclaration(server.module_backends, dht, daemon=True)
    server.dht_handler_thread.server = server
    server.run_in_background(await_ready=True)
    addresses = [str(address) for address in dht.get_visible_maddrs()]
    lines.event("ready", peer=dht.peer_id.to_base58(), addresses=addresses)
    sys.stdin.read()
    os._exit(0)  # its processes end with their session


if __name__ == "__main__":
    main()
