"""A KwaaiNet peer for tests, written from the specification of its protocols alone.

It shares only the host with this package: what KwaaiNet and Hivemind's unary calls put on a stream is encoded and decoded here
a second time, by hand, so that the two implementations cannot share a mistake. It has the habits of the deployed
Rust peers: byte strings go out as arrays of integers, map keys in their documented order, ``error`` is always there,
identify names no protocol without a leading slash, sessions have bare numbers for keys, a node that leaves writes state -1.
What it is sent is read as strictly as their typed decoders do it.

A network of two servers and a client::

    async with simulated_bootstrap() as boot:
        async with simulated_server(blocks=range(0, 4), bootstrap=[boot]) as first:
            async with simulated_server(blocks=range(4, 8), bootstrap=[boot]) as last:
                async with simulated_client(bootstrap=[boot]) as client:
                    tokens = await client.generate([1, 42, 99], 20)
                    assert first.complaints == last.complaints == []

``bootstrap`` takes addresses, or whatever has an ``address``. Each peer listens on 127.0.0.1, has an identity of its own, greets,
answers greetings (``peer.greetings``) and the DHT's methods. All have:

``peer.peer_id``, ``peer.address``
    in base58, and a full multiaddr
``peer.complaints``
    what others did against the rules
``peer.dht.held``
    what others stored there: ``.find(key_id("tiny-llama-v1.0"))``, and ``.log`` with who stored what
``await peer.hello(other)``
    greet; ``other`` is a peer or a peer id
``await peer.kill()``
    die at once; ``peer.refuse(protocol)`` and ``peer.accept(protocol)`` turn single protocols off and on
``peer.unlisted``
    protocols that identify leaves out as well

A server also has ``requests``, ``announcements``, ``tensors``, ``span.sessions`` and ``faults``, which may be changed at any time
(``server.faults.silent = True``; see :class:`Faults`), ``await server.announce()`` for a round out of turn and
``await server.finish_warming_up()``. It announces itself before the block begins, then every ``period`` seconds, and withdraws
at the end of the block. Its mux answers ``/echo`` and, after the answer to a later request, ``/echo/late``.

A client also has ``servers()``, ``nodes()`` and ``models()`` (what the DHT says by the readers' rules, ``skipped`` for
what they left out), ``infer``, ``lease``, ``send_tensor`` and ``mux`` for single calls, ``generate``, and what it has seen: ``blacklist``,
``failures``, ``denials``.

Models are ``TINY`` (8 blocks, hidden size 64, vocabulary of 384) and ``AUSTEN`` (8 blocks, 192, 2048).

Tests of other folders put this one on ``sys.path`` in their ``conftest.py``. ``generate_locally`` generates with the whole model in one piece and the same rounding to float16. A span's range ends before its last number.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sim_client import NoChain, ServerFailed, SimulatedClient, find_chain
from sim_dht import key_id
from sim_messages import HELLO, INFERENCE, LEASE, MUX, TENSOR
from sim_model import AUSTEN, TINY, Model, generate_locally
from sim_peer import SimulatedPeer, running
from sim_records import PERIOD_SECONDS
from sim_server import Faults, SimulatedServer

__all__ = [
    "AUSTEN",
    "HELLO",
    "INFERENCE",
    "LEASE",
    "MUX",
    "TENSOR",
    "TINY",
    "Faults",
    "Model",
    "NoChain",
    "ServerFailed",
    "SimulatedClient",
    "SimulatedPeer",
    "SimulatedServer",
    "find_chain",
    "generate_locally",
    "key_id",
    "simulated_bootstrap",
    "simulated_client",
    "simulated_server",
]


@asynccontextmanager
async def simulated_bootstrap(
    *, bootstrap: Sequence[Any] = (), clock: Callable[[], float] = time.time, timeout: float = 10
) -> AsyncIterator[SimulatedPeer]:
    """A bootstrap peer of KwaaiNet: the DHT's methods over one dictionary, of which it tells all and forwards nothing."""
    async with running(SimulatedPeer(bootstrap=bootstrap, clock=clock, timeout=timeout)) as peer:
        yield peer


@asynccontextmanager
async def simulated_server(
    *,
    blocks: range,
    bootstrap: Sequence[Any] = (),
    model: Model = TINY,
    faults: Faults | None = None,
    refuses: Sequence[str] = (),
    version: str = "kwaai-0.6.2",
    throughput: float = 10.0,
    warming_up: bool = False,
    leases: int = 8,
    period: float = PERIOD_SECONDS,
    clock: Callable[[], float] = time.time,
    timeout: float = 10,
) -> AsyncIterator[SimulatedServer]:
    """A node that serves ``blocks`` of ``model`` and has announced itself.

    ``refuses``: protocols that it answers with ``na``. ``warming_up``: the model is still loading. ``leases``: how many
    peers may hold one at a time. ``period``: seconds between announcements. ``timeout``: seconds for each of its own calls.
    """
    server = SimulatedServer(
        blocks, model, faults=faults or Faults(), refuses=refuses, version=version, throughput=throughput,
        warming_up=warming_up, leases=leases, period=period, bootstrap=bootstrap, clock=clock, timeout=timeout,
    )  # fmt: skip
    async with running(server):
        yield server


@asynccontextmanager
async def simulated_client(
    *,
    bootstrap: Sequence[Any] = (),
    model: Model = TINY,
    clock: Callable[[], float] = time.time,
    timeout: float = 10,
    **more: Any,
) -> AsyncIterator[SimulatedClient]:
    """A node that uses the blocks of others. ``timeout``: seconds for each of its calls. ``session_ids``: makes their numbers."""
    client = SimulatedClient(model, bootstrap=bootstrap, clock=clock, timeout=timeout, **more)
    async with running(client):
        yield client
