"""One host of ours on a machine of the laboratory, driven over stdin and stdout (interop/stock/lines.py).

It serves ``Echo.run``, which sends back all it reads, and the unary method ``Echo.rpc_echo``.

Commands::

    start       {key, **options}        -> {peer, addresses}; ``key``: identity file, made when missing; the others
                                           are fields of HostConfig
    addresses   {}                      -> what it tells others
    connect     {address}               -> peer id
    call        {peer, size}            -> seconds until ``size`` bytes had come back over ``Echo.run``, unchanged
    unary       {peer, size, timeout}   -> seconds of a call of ``Echo.rpc_echo``
    ping        {peer}                  -> seconds of a ping, which every libp2p host answers
    connections {}                      -> [{peer, address, relay, initiator, streams}]; ``relay``: who carries it, or null
    protocols   {peer}                  -> what a connected peer says that it serves
    known       {peer}                  -> where that peer may be dialled
    add         {peer, addresses}       -> null; they may be dialled from now on
    gone        {peer}                  -> seconds until no connection to the peer is open
    keep        {addresses}             -> null; stays connected to these from now on. Event ``kept`` {address, error}
    relay       {}                      -> null; it relays for others from now on
    hide        {}                      -> null; it holds places at relays from now on
    seen        {}                      -> public addresses as which peers see it
    reachable   {peer}                  -> [verdict, address, text] of that peer's AutoNAT, about this host
    dial_back   {}                      -> null; serves AutoNAT from now on
    dialled     {}                      -> [{peer, asked, outcome}], whom that has dialled back, at which addresses, and the one
                                           that it was reached at, or the error
    stop        {}                      -> null

Event: ``ready``. Several commands run at a time; a new one is a method of Commands.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio
from lines import Lines
from multiaddr import Multiaddr

from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.net import HostConfig, Libp2pHost, Stream, autonat, open_host
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.bootstrap import BootstrapEvent, keep_bootstrapped
from kwaainet_bridge.net.identity import load_identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.net.probe import dial_anew
from kwaainet_bridge.rpc import CallContext, RpcClient, RpcServer, unary
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

ECHO = "Echo.run"
UNARY_ECHO = unary("Echo.rpc_echo", ExpertRequest, ExpertResponse)

lines = Lines()


async def echo(stream: Stream) -> None:
    while data := await stream.read(1 << 20):
        await stream.write(data)


async def unary_echo(request: ExpertRequest, _context: CallContext) -> ExpertResponse:
    return ExpertResponse(metadata=request.metadata)


class Commands:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._stop = trio.Event()
        self._stopped = trio.Event()
        self._host: Libp2pHost | None = None
        self._dialled: list[dict[str, Any]] = []

    @property
    def host(self) -> Libp2pHost:
        assert self._host is not None, "start it first"
        return self._host

    async def start(self, key: str, limits: dict[str, int] | None = None, **options: Any) -> dict[str, Any]:
        more = {"limits": Limits(**limits or {}), **options}
        self._host = await self._nursery.start(self._run, key, more)
        return {"peer": str(self.host.peer_id), "addresses": self.host.addresses()}

    async def _run(self, key: str, options: dict[str, Any], *, task_status: Any) -> None:
        with load_identity(key, kind="ed25519") as identity:
            async with open_host(HostConfig(identity, **options)) as host:
                host.serve(ECHO, echo)
                RpcServer(host).mount(UNARY_ECHO, unary_echo)
                task_status.started(host)
                await self._stop.wait()
        self._stopped.set()

    async def addresses(self) -> list[str]:
        return self.host.addresses()

    async def connect(self, address: str) -> str:
        return str(await self.host.connect(address))

    async def call(self, peer: str, size: int = 1000) -> float:
        began, payload, received = trio.current_time(), secrets.token_bytes(size), bytearray()
        stream = await self.host.open_stream(PeerId.parse(peer), ECHO)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, payload)
                while len(received) < size:
                    data = await stream.read(1 << 20)
                    if not data:
                        raise EOFError(f"{ECHO}: {len(received)} of {size} bytes came back")
                    received += data
        finally:
            stream.reset_now()
        if received != payload:
            raise ValueError(f"{size} bytes came back changed")
        return trio.current_time() - began

    async def unary(self, peer: str, size: int = 1000, timeout: float = 30.0) -> float:
        began, payload = trio.current_time(), secrets.token_bytes(size)
        request = ExpertRequest(metadata=payload)
        response = await RpcClient(self.host).call(PeerId.parse(peer), UNARY_ECHO, request, timeout=timeout)
        if response.metadata != payload:
            raise ValueError(f"{size} bytes came back changed")
        return trio.current_time() - began

    async def ping(self, peer: str) -> float:
        began = trio.current_time()
        await ping(self.host, PeerId.parse(peer))
        return trio.current_time() - began

    async def connections(self) -> list[dict[str, Any]]:
        return [
            {
                "peer": str(connection.remote),
                "address": str(Multiaddr(connection.remote_address)) if connection.relay is None else "",
                "relay": None if connection.relay is None else str(connection.relay),
                "initiator": connection.initiator,
                "streams": connection.open_streams,
            }
            for connection in self.host.connections
        ]

    async def protocols(self, peer: str) -> list[str]:
        description = self.host.description(PeerId.parse(peer))
        return [] if description is None else sorted(description.protocols)

    async def known(self, peer: str) -> list[str]:
        return self.host.known_addresses(PeerId.parse(peer))

    async def add(self, peer: str, addresses: list[str]) -> None:
        self.host.add_addresses(PeerId.parse(peer), addresses)

    async def gone(self, peer: str) -> float:
        began = trio.current_time()
        await self.host.wait_disconnected(PeerId.parse(peer))
        return trio.current_time() - began

    async def keep(self, addresses: list[str]) -> None:
        def tell(event: BootstrapEvent) -> None:
            error = None if event.error is None else str(event.error)
            lines.event("kept", address=event.address, error=error)

        self._nursery.start_soon(partial(keep_bootstrapped, self.host, addresses, on_event=tell))

    async def relay(self) -> None:
        self.host.traversal.offer(True)

    async def hide(self) -> None:
        await self.host.wait_identified()
        self.host.traversal.keeper.want(True)

    async def seen(self) -> list[str]:
        await self.host.wait_identified()
        return [str(address) for address in self.host.own.for_punching()]

    async def reachable(self, peer: str) -> list[Any]:
        await self.host.wait_identified()
        found = await autonat.ask(self.host, PeerId.parse(peer), self.host.own.for_checks())
        return [found.reachable, found.address and str(found.address), found.text]

    async def dial_back(self) -> None:
        def seen(peer: PeerId) -> str:
            connection = self.host.connections.find(peer)
            return "" if connection is None else connection.remote_host

        async def dial(peer: PeerId, addresses: Sequence[Address]) -> Address:
            entry = {"peer": str(peer), "asked": [str(a) for a in addresses]}
            try:
                found = await dial_anew(peer, addresses)
            except NetworkError as e:
                self._dialled.append({**entry, "outcome": str(e)})
                raise
            self._dialled.append({**entry, "outcome": str(found)})
            return found

        self.host.serve(autonat.AUTONAT, autonat.AutoNatService(seen, dial).serve)

    async def dialled(self) -> list[dict[str, Any]]:
        return self._dialled

    async def stop(self) -> None:
        self._stop.set()
        await self._stopped.wait()


async def main() -> None:
    async with trio.open_nursery() as nursery:
        commands = Commands(nursery)

        async def run(request: dict[str, Any]) -> None:
            arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
            try:
                lines.result(request, await getattr(commands, request["do"])(**arguments))
            except Exception as e:
                lines.error(request, e)

        lines.event("ready")
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            nursery.start_soon(run, json.loads(line))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
