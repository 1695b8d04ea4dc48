"""Stock Hivemind peers, each on a machine of the laboratory of its own; driven over stdin and stdout (interop/stock/lines.py).

They share this process, since importing Hivemind takes seconds: only a peer's daemon, which alone touches the network, runs
on its machine. Each serves ``Echo.run``, which sends back all it reads, and the unary method ``Echo.rpc_echo``.

Commands::

    start       {namespace, **options}       -> {at, peer, addresses}; ``namespace``: the file of the machine's network
                                                namespace; the others are those of hivemind.P2P.create
    addresses   {at}                         -> what it tells others
    connect     {at, address}                -> peer id
    disconnect  {at, peer}                   -> null
    call        {at, peer, size}             -> seconds until ``size`` bytes had come back over ``Echo.run``, unchanged
    unary       {at, peer, size, timeout}    -> seconds of a call of ``Echo.rpc_echo``
    connections {at}                         -> [{peer, addresses}]; a relayed one has ``/p2p-circuit`` in its address
    dht         {at, initial_peers}          -> null; makes it a node of Hivemind's DHT. ``initial_peers``: of Hivemind's
                                                DHT; the daemon has its own
    store       {at, key, value, ttl}        -> bool
    get         {at, key}                    -> value, or null; of a record with subkeys {subkey: value}
    routes      {at}                         -> peer ids in the routing table of its DHT
    kill        {at}                         -> null; its daemon ends without a word to anybody
    stop        {at}                         -> null

``at`` is a number that ``start`` gives. Event: ``ready``. Several commands run at a time; a new one is a method of Commands.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import sys
import time
from typing import Any

from hivemind.dht import DHTNode
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.multiaddr import Multiaddr
from lines import Lines

ECHO, UNARY_ECHO = "Echo.run", "Echo.rpc_echo"

lines = Lines()


async def echo(_info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def unary_echo(request: ExpertRequest, _context: P2PContext) -> ExpertResponse:
    return ExpertResponse(metadata=request.metadata)


def on_machine(namespace: str) -> type[P2P]:
    """P2P whose daemons run in that network namespace. How they are talked to, by files, stays as it is."""

    class P2PThere(P2P):
        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            return ["nsenter", f"--net={namespace}", "--", *P2P._make_process_args(*args, **kwargs)]

    return P2PThere


def plain(value: Any) -> Any:
    """A value of the DHT as JSON."""
    if isinstance(value, dict):
        return {k: plain(v.value if isinstance(v, ValueWithExpiration) else v) for k, v in value.items()}
    return value


class Commands:
    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._peers: dict[int, P2P] = {}
        self._dht: dict[int, DHTNode] = {}

    async def start(self, namespace: str, **options: Any) -> dict[str, Any]:
        p2p = await on_machine(namespace).create(**options)
        await p2p.add_binary_stream_handler(ECHO, echo)
        await p2p.add_protobuf_handler(UNARY_ECHO, unary_echo, ExpertRequest)
        at = next(self._numbers)
        self._peers[at] = p2p
        return {"at": at, "peer": p2p.peer_id.to_base58(), "addresses": await self.addresses(at)}

    async def addresses(self, at: int) -> list[str]:
        return [str(address) for address in await self._peers[at].get_visible_maddrs(latest=True)]

    async def connect(self, at: int, address: str) -> str:
        transport, _, peer = address.rpartition("/p2p/")
        await self._peers[at]._client.connect(PeerID.from_base58(peer), [Multiaddr(transport)])
        return peer

    async def disconnect(self, at: int, peer: str) -> None:
        await self._peers[at]._client.disconnect(PeerID.from_base58(peer))

    async def call(self, at: int, peer: str, size: int = 1000) -> float:
        began, payload = time.monotonic(), secrets.token_bytes(size)
        _, reader, writer = await self._peers[at].call_binary_stream_handler(PeerID.from_base58(peer), ECHO)

        async def send() -> None:
            for first in range(0, size, 65536):
                writer.write(payload[first : first + 65536])
                await writer.drain()

        try:
            received, _ = await asyncio.gather(reader.readexactly(size), send())
        finally:
            writer.close()
        if received != payload:
            raise ValueError(f"{size} bytes came back changed")
        return time.monotonic() - began

    async def unary(self, at: int, peer: str, size: int = 1000, timeout: float = 30.0) -> float:
        began, payload = time.monotonic(), secrets.token_bytes(size)
        calling = self._peers[at].call_protobuf_handler(
            PeerID.from_base58(peer), UNARY_ECHO, ExpertRequest(metadata=payload), ExpertResponse
        )
        response = await asyncio.wait_for(calling, timeout)
        if response.metadata != payload:
            raise ValueError(f"{size} bytes came back changed")
        return time.monotonic() - began

    async def connections(self, at: int) -> list[dict[str, Any]]:
        peers = await self._peers[at].list_peers()
        return [{"peer": p.peer_id.to_base58(), "addresses": [str(a) for a in p.addrs]} for p in peers]

    async def dht(self, at: int, initial_peers: list[str]) -> None:
        p2p = self._peers[at]
        self._dht[at] = await DHTNode.create(p2p=p2p, initial_peers=[Multiaddr(a) for a in initial_peers])

    async def store(self, at: int, key: str, value: Any, ttl: float = 300.0) -> bool:
        return bool(await self._dht[at].store(key, value, get_dht_time() + ttl))

    async def get(self, at: int, key: str) -> Any:
        found = await self._dht[at].get(key, latest=True)
        return None if found is None else plain(found.value)

    async def routes(self, at: int) -> list[str]:
        return [peer.to_base58() for peer in self._dht[at].protocol.routing_table.peer_id_to_uid]

    async def kill(self, at: int) -> None:
        self._peers.pop(at)._child.kill()
        self._dht.pop(at, None)

    async def stop(self, at: int) -> None:
        node, p2p = self._dht.pop(at, None), self._peers.pop(at)
        if node is not None:
            await node.shutdown()
        await p2p.shutdown()


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
    os._exit(0)  # whoever started this script ends its daemons


if __name__ == "__main__":
    asyncio.run(main())
