"""``kwaainet-bridge ping`` and ``bench net``: what one connection can do."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.perf import PERF, answer_measurement, measure
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.wire.peer_id import PeerId

_CALL_SECONDS = 10.0
_LABEL = "address"


@asynccontextmanager
async def _dialling_host() -> AsyncIterator[Libp2pHost]:
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        yield host


async def _connect(host: Libp2pHost, address: str) -> tuple[PeerId, dict[str, Any]]:
    """The peer, and what is known of it once it is connected and has said who it is."""
    began = trio.current_time()
    peer = await host.connect(address)
    seconds = trio.current_time() - began
    await host.wait_identified()
    description = host.description(peer)
    connection = host.connections.find(peer)
    if connection is None:
        raise NetworkError(f"{peer} closed the connection at once")
    round_trips = [await connection.ping() for _ in range(5)]
    return peer, {
        "peer": str(peer),
        "agent": description.agent if description is not None else "",
        "connected_ms": _ms(seconds),
        "security": connection.security,
        "muxer": connection.muxer,
        "round_trip_ms": _ms(min(round_trips)),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _print_peer(facts: dict[str, Any]) -> None:
    typer.echo(f"peer        {facts['peer']} {facts['agent']}".rstrip())
    typer.echo(f"connected   {facts['connected_ms']:.1f} ms, {facts['security']}, {facts['muxer']}")
    typer.echo(f"round trip  {facts['round_trip_ms']:.2f} ms")


async def ping_peer(address: str, count: int, as_json: bool) -> None:
    """Time ``count`` accepted calls: each opens a stream, sends 32 bytes and receives them back.

    Raises PeerUnreachable, which names the hop that failed, or NetworkError if a call is not answered.
    """
    async with _dialling_host() as host:
        peer, facts = await _connect(host, address)
        if not as_json:
            _print_peer(facts)
        calls = []
        for number in range(count):
            began = trio.current_time()
            try:
                with trio.fail_after(_CALL_SECONDS):
                    await ping(host, peer)
            except trio.TooSlowError:
                raise NetworkError(f"{peer} did not answer a ping within {_CALL_SECONDS:g} s") from None
            calls.append(_ms(trio.current_time() - began))
            if not as_json:
                typer.echo(f"call {number + 1:<6} {_in_round_trips(calls[-1], facts)}")
        median = statistics.median(calls)
        if as_json:
            round_trips = median / facts["round_trip_ms"]
            typer.echo(json.dumps(facts | {"calls_ms": calls, "call_round_trips": round(round_trips, 2)}))
        else:
            typer.echo(f"median      {_in_round_trips(median, facts)}")


def _in_round_trips(milliseconds: float, facts: dict[str, Any]) -> str:
    return f"{milliseconds:.2f} ms, {milliseconds / facts['round_trip_ms']:.2f} round trips"


async def serve_net(listen: str) -> None:
    """Listen for :func:`measure_net` of others until cancelled. Raises ConfigError for a bad address."""
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=(listen,))) as host:
        host.serve(PERF, answer_measurement)
        for address in host.addresses():
            typer.echo(f"{_LABEL}  {address}")
        await trio.sleep_forever()


async def measure_net(address: str | None, megabytes: int, as_json: bool) -> None:
    """Measure against ``serve_net`` at ``address``, or one that is started for this on loopback.

    Raises PeerUnreachable, ProtocolNotSupported if nobody serves measurements there, NetworkError.
    """
    async with _dialling_host() as host, _or_own(address) as target:
        peer, facts = await _connect(host, target)
        if not as_json:
            _print_peer(facts)
        speed = await measure(host, peer, megabytes * 10**6)
        up, down = round(speed.up / 1e6, 1), round(speed.down / 1e6, 1)
        if as_json:
            typer.echo(json.dumps(facts | {"megabytes": megabytes, "up_mb_s": up, "down_mb_s": down}))
        else:
            typer.echo(f"up          {up:.1f} MB/s")
            typer.echo(f"down        {down:.1f} MB/s")


@asynccontextmanager
async def _or_own(address: str | None) -> AsyncIterator[str]:
    """``address``, or that of a process of our own on loopback, for as long as the block runs."""
    if address is not None:
        yield address
        return
    arguments = ["bench", "net", "--serve", "--listen", "/ip4/127.0.0.1/tcp/0"]
    command = [sys.executable, "-m", "kwaainet_bridge", *arguments]
    run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(run)
        yield await _announced_address(process)
        nursery.cancel_scope.cancel()


async def _announced_address(process: trio.Process) -> str:
    if process.stdout is None:
        raise RuntimeError("the process has no pipe")
    line = b""
    with trio.move_on_after(defaults.HANDSHAKE_SECONDS):
        while not line.endswith(b"\n") and (data := await process.stdout.receive_some(4096)):
            line += data
    label, _, address = line.decode().partition("\n")[0].partition("  ")
    if label != _LABEL:
        raise NetworkError("the other process of the measurement did not start")
    return address
