"""An unmodified py-libp2p host, driven over stdin and stdout; must not import this package.

Prints its address, then answers each line ``{"do": name, ...}`` with ``{"ok": value}``.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
from contextlib import suppress

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

ECHO = "Echo.run"

logging.disable()


async def echo(stream) -> None:
    with suppress(StreamEOF):  # what a handler raises ends the host
        while True:
            await stream.write(await stream.read(65536))
    await stream.close()


async def call(host, address: str, size: int) -> str:
    """Dial our host and have ``size`` bytes echoed."""
    info = info_from_p2p_addr(Multiaddr(address))
    await host.connect(info)
    stream = await host.new_stream(info.peer_id, [ECHO])
    payload = secrets.token_bytes(size)
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, payload)
        while len(received) < size:
            received += await stream.read(size - len(received))
    await stream.close()
    return "same" if received == payload else "changed"


async def main() -> None:
    host = new_host(key_pair=create_new_key_pair(secrets.token_bytes(32)))
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        host.set_stream_handler(ECHO, echo)
        print(next(str(a) for a in host.get_addrs() if "127.0.0.1" in str(a)), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            command = json.loads(line)
            try:
                answer = {"ok": await call(host, command["address"], command["size"])}
            except Exception as e:
                answer = {"error": f"{type(e).__name__}: {e}"}
            print(json.dumps(answer), flush=True)
        await host.close()


trio.run(main)
