"""A walk through the whole DHT: who is there, and how far away in time. For people who watch a network."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.dht import messages
from kwaainet_bridge.hivemind.dht.id import ID_BITS, DhtId
from kwaainet_bridge.hivemind.dht.messages import FIND, PING
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class MetNode:
    """One peer of the walk.

    ``node_id`` is what it says itself, or what another said of one that did not answer. ``seconds`` is the
    round trip of a DHT ping, ``ahead`` how many seconds its clock is ahead of ours, both None without an answer;
    ``error`` is empty with one. ``neighbours`` counts the nodes that it named.
    """

    peer: PeerId
    node_id: DhtId | None
    seconds: float | None = None
    ahead: float | None = None
    neighbours: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Walk:
    """Everybody who was met, in the order of their answers; ``complete`` unless a limit ended it."""

    nodes: tuple[MetNode, ...]
    complete: bool


class _Frontier:
    """Whom to ask next. Each node that named others has its turn, so that none decides alone where the walk goes."""

    def __init__(self, start: Iterable[PeerId], *, without: PeerId) -> None:
        self._lists: deque[deque[tuple[PeerId, DhtId | None]]] = deque([deque((p, None) for p in start)])
        self._taken = {without}

    @property
    def asked(self) -> int:
        return len(self._taken) - 1

    def add(self, contacts: Iterable[Contact]) -> None:
        self._lists.append(deque((c.peer, c.node_id) for c in contacts if c.peer not in self._taken))

    def next(self) -> tuple[PeerId, DhtId | None] | None:
        """Somebody who was not asked yet, with the node id he is said to have; None if nobody is left."""
        while self._lists:
            named = self._lists.popleft()
            while named:
                peer, node_id = named.popleft()
                if peer not in self._taken:
                    self._taken.add(peer)
                    self._lists.append(named)
                    return peer, node_id
        return None


async def walk(
    rpc: RpcClient,
    start: Iterable[PeerId],
    *,
    own: PeerId,
    on_answer: Callable[[PeerId], Awaitable[None]] | None = None,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
    max_peers: int = defaults.WALK_MAX_PEERS,
    seconds: float = defaults.WALK_SECONDS,
) -> Walk:
    """Ask ``start``, and everybody that those who are asked name, whom they know in each part of the id space.

    Peers are asked as by a client, which nobody remembers. ``on_answer`` is awaited for each that answered, while
    the connection to it is probably open. Raises nothing for peers that fail; nodes in client mode, which nobody
    names, are not met. Cancelled: its calls are cancelled, nothing remains.
    """
    rng = rng or random.SystemRandom()
    bits = ID_BITS - 4
    targets = [DhtId(part << bits | rng.getrandbits(bits)) for part in range(defaults.DHT_KEYS_PER_QUERY)]
    frontier = _Frontier(start, without=own)
    nodes: list[MetNode] = []
    running = 0
    changed = trio.Event()

    async def visit(peer: PeerId, node_id: DhtId | None) -> None:
        nonlocal running
        try:
            node, named = await _ask(rpc, peer, targets, clock)
        except (NetworkError, RemoteError) as e:
            nodes.append(MetNode(peer, node_id, error=str(e)))
        else:
            frontier.add(named)
            nodes.append(node)
            if on_answer is not None:
                await on_answer(peer)
        finally:
            running -= 1
            changed.set()

    left = None
    with trio.move_on_after(seconds) as limit:
        async with trio.open_nursery() as nursery:
            while True:
                if running < defaults.WALK_PARALLEL_PEERS and (left := frontier.next()) is not None:
                    if frontier.asked > max_peers:
                        break
                    running += 1
                    nursery.start_soon(visit, *left)
                elif running:
                    changed = trio.Event()
                    await changed.wait()
                else:
                    break
    return Walk(tuple(nodes), complete=left is None and not limit.cancelled_caught)


async def _ask(
    rpc: RpcClient, peer: PeerId, targets: list[DhtId], clock: Callable[[], float]
) -> tuple[MetNode, list[Contact]]:
    """Whom a node knows, then its round trip: by then it is connected. NetworkError or RemoteError."""
    client = pb.NodeInfo()  # no node id: a client
    timeout = defaults.DHT_CALL_SECONDS
    found = await rpc.call(peer, FIND, messages.find_request(targets, client), timeout=timeout)
    answers = messages.read_find_response(found, targets, now=clock())
    named = {contact.peer: contact for answer in answers.values() for contact in answer.neighbours}

    sent, started = clock(), trio.current_time()
    pong = await rpc.call(peer, PING, pb.PingRequest(peer=client), timeout=timeout)
    received, seconds = clock(), trio.current_time() - started
    told = pong.dht_time
    ahead = told - (sent + received) / 2 if told else None
    node_id = messages.responder(pong)
    return MetNode(peer, node_id, seconds, ahead, len(named)), list(named.values())
