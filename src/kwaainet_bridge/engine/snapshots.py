"""What sessions look like from outside at one moment, for people who look at a node. Nothing here can change one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """A session of the engine.

    ``position`` counts the tokens of each of ``batch_size`` sequences, of which there may be ``max_length``.
    ``cache_tokens`` is what its pages hold in each of ``blocks``, those included that it shares with others;
    ``promised_tokens`` what nobody else can have. One that is ``moved_out`` has its pages in the host's memory.
    """

    blocks: range
    batch_size: int
    max_length: int
    position: int
    cache_tokens: int
    promised_tokens: int
    moved_out: bool
    adapter: str | None


@dataclass(frozen=True, slots=True)
class ServedSession:
    """A session that a peer has here.

    ``name`` is what the peer calls it, None if it has no name. ``began`` and ``idle_since`` are times of the server's
    clock; the latter is None while a step runs or is waited for. ``session`` is None as long as it waits for room in
    the KV cache; ``blocks`` are those it is for.
    """

    peer: Hashable
    name: str | None
    blocks: range
    adapter: str | None
    began: float
    idle_since: float | None
    session: SessionSnapshot | None
