"""What a client's sessions, and the servers that it avoids, look like at one moment. Nothing here can change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class ClientSession:
    """A session over servers of a swarm.

    ``position`` counts the tokens of each of ``batch_size`` sequences, of which there may be ``max_length``; ``chain``
    is empty before the first step. ``began`` and ``idle_since`` are times of the swarm's clock; the latter is None
    while a step runs.
    """

    blocks: range
    batch_size: int
    max_length: int
    position: int
    chain: Sequence[Hop]
    adapter: str | None
    began: float
    idle_since: float | None


@dataclass(frozen=True, slots=True)
class AvoidedServer:
    """A server that is not called for so many ``seconds`` more, and why."""

    peer: PeerId
    network: str
    seconds: float
    reason: str
