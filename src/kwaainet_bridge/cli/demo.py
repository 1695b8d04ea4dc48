"""``kwaainet-bridge demo``: a private swarm of two nodes on one machine, and text that both have made."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio
import typer

from kwaainet_bridge.cli.generate import GenerateOptions, generate_text
from kwaainet_bridge.cli.run import JOIN_LABEL, SERVING_LABEL
from kwaainet_bridge.config import EMBEDDED_MODEL, parse_config
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.client import Sampling

_START_SECONDS = 180.0  # the first start on a slow machine imports torch from a cold disk
_STOP_SECONDS = 15.0
_TOKENS = 80
_SAMPLING = Sampling(do_sample=True, temperature=0.7, top_p=0.9)  # a small model repeats itself when greedy
_SEED = 1813
_BLOCKS = ("0:4", "4:8")

_CONFIG = """\
# Written by `kwaainet-bridge demo`: one of the two nodes of its private swarm.
identity: {{path: {name}.key, kind: ed25519}}
listen: [/ip4/127.0.0.1/tcp/0]
networks: {{petals: {{bootstrap: {bootstrap}}}}}
model: {{name: {model}, blocks: "{blocks}", cache_tokens: 8192, max_length: 2048}}
drain_seconds: 5
log: {{format: json}}
"""


@dataclass(frozen=True, slots=True)
class _DemoNode:
    """A node in a process of its own, that serves."""

    name: str
    blocks: str
    address: str
    log: Path


class Started(Protocol):
    """Tells nursery.start() that the node serves."""

    def started(self, node: _DemoNode, /) -> None: ...


async def run_demo(folder: Path, prompt: str, once: bool) -> int | None:
    """Start two nodes that hold half of the embedded model each, generate through both, leave them running.

    Ends with Ctrl-C, with SIGTERM or SIGHUP, whose number it returns, or after the text if ``once``; the nodes
    are drained first. Raises NetworkError, with the end of its log, for a node that does not start.
    """
    signals = {signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to live on
        signals.add(signal.SIGHUP)
    interruption = _Interruption()
    with trio.open_signal_receiver(*signals) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interruption.cancel_when, received, nursery.cancel_scope)
            await _run_swarm(folder, prompt, once)
            nursery.cancel_scope.cancel()
    return interruption.number


class _Interruption:
    """The signal that ended the demonstration, if one did."""

    number: int | None = None

    async def cancel_when(self, received: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in received:
            self.number = number
            scope.cancel()


async def _run_swarm(folder: Path, prompt: str, once: bool) -> None:
    await trio.Path(folder).mkdir(parents=True, exist_ok=True)
    nodes: list[_DemoNode] = []
    async with trio.open_nursery() as nursery:
        for number, blocks in enumerate(_BLOCKS, start=1):
            bootstrap = [node.address for node in nodes]
            node = await nursery.start(partial(_run_node, folder, f"node-{number}", blocks, bootstrap))
            typer.echo(f"{node.name} serves blocks {blocks} of {EMBEDDED_MODEL} at {node.address}", err=True)
            nodes.append(node)
        swarm = {"networks": {"petals": {"bootstrap": [n.address for n in nodes]}}, "model": {}}
        typer.echo("", err=True)
        options = GenerateOptions(prompt, _TOKENS, _SAMPLING, seed=_SEED, show_route=True)
        await generate_text(parse_config(json.dumps(swarm), "demo"), options)
        if not once:
            typer.echo(_how_to_talk(nodes), err=True)
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()


async def _run_node(
    folder: Path,
    name: str,
    blocks: str,
    bootstrap: list[str],
    task_status: Started = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one node; report it once it serves, and drain it when cancelled."""
    config, log_path = folder / f"{name}.yaml", folder / f"{name}.log"
    config.write_text(
        _CONFIG.format(name=name, bootstrap=json.dumps(bootstrap), model=EMBEDDED_MODEL, blocks=blocks)
    )
    command = [sys.executable, "-m", "kwaainet_bridge", "run", "-c", str(config)]
    with log_path.open("wb") as log:
        # a session of its own: Ctrl-C comes to this process alone, which then stops the nodes in order
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        address = await _wait_until_serving(process)
        if address is None:
            with trio.move_on_after(1):
                await process.wait()
            raise NetworkError(f"{name} did not start; the end of {log_path}:\n{_tail(log_path)}")
        task_status.started(_DemoNode(name, blocks, address, log_path))
        await process.wait()
        raise NetworkError(f"{name} ended by itself; the end of {log_path}:\n{_tail(log_path)}")
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)


async def _wait_until_serving(process: trio.Process) -> str | None:
    """Read what the node prints; return its address once it serves, None if it ends or takes too long."""
    assert process.stdout is not None
    printed = b""
    with trio.move_on_after(_START_SECONDS):
        async for data in process.stdout:
            printed += data
            lines = printed.decode().splitlines()
            if any(line.startswith(SERVING_LABEL) for line in lines):
                return next(line for line in lines if line.startswith(JOIN_LABEL)).split()[-1]
    return None


async def _stop(process: trio.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    with trio.move_on_after(_STOP_SECONDS):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def _tail(log: Path, lines: int = 15) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, lines))


def _how_to_talk(nodes: list[_DemoNode]) -> str:
    address = nodes[0].address
    logs = " and ".join(str(node.log) for node in nodes)
    return f"""
The swarm keeps running; Ctrl-C stops it. Its logs are {logs}.
Talk to it from another terminal:

  kwaainet-bridge generate "My dear Mr. Bennet" --initial-peers {address}

Any stock Petals client can use it too, with the same address in initial_peers and dht_prefix="{EMBEDDED_MODEL}-hf".
Another node joins with:

  kwaainet-bridge run --model {EMBEDDED_MODEL} --listen /ip4/127.0.0.1/tcp/0 --initial-peers {address}
"""
