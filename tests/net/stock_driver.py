"""Stock Hivemind peers for the tests: runs in the stock environment, speaks JSON lines on stdin and stdout.

Must not import this package. Commands: {"do": name, "at": peer number, ...} -> {"ok": value} or {"error": text}.
All peers live in one process, as importing Hivemind takes seconds; each has a daemon of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

peers: dict[int, P2P] = {}


async def start(at, initial_peers=(), identity_path=None, **options):
    peers[at] = p2p = await P2P.create(
        initial_peers=list(initial_peers), identity_path=identity_path, **options
    )
    await p2p.add_binary_stream_handler("Echo.run", echo)
    address, *_ = await p2p.get_visible_maddrs()
    return str(address)


async def echo(_info, reader, writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def call(at, peer, size, protocol="Echo.run"):
    """Send ``size`` bytes to a peer's echo and return the digest of what comes back."""
    _, reader, writer = await peers[at].call_binary_stream_handler(PeerID.from_base58(peer), protocol)
    payload = bytes(i % 251 for i in range(size))

    async def send() -> None:
        for first in range(0, size, 65536):
            writer.write(payload[first : first + 65536])
            await writer.drain()

    sending = asyncio.ensure_future(send())
    received = await reader.readexactly(size)
    await sending
    writer.close()
    return hashlib.sha256(received).hexdigest()


async def connect(at, address):
    transport, _, peer = address.partition("/p2p/")
    await peers[at]._client.connect(PeerID.from_base58(peer), [Multiaddr(transport)])


async def kill(at):
    """End the daemon without a word to its peers."""
    peers[at]._child.kill()


async def stop(at):
    await peers.pop(at).shutdown()


COMMANDS = {command.__name__: command for command in (start, call, connect, kill, stop)}


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            answer = {"ok": await COMMANDS[command.pop("do")](**command)}
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), flush=True)


asyncio.run(main())
