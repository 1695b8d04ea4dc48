"""What a session needs of each server of its chain, and of networks beside Petals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.client.history import Chunk, History
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.wire.peer_id import PeerId

NextServer: TypeAlias = tuple[str, str, int, int]
"""An entry of the metadata's ``next_servers``: peer id in base58, session id, first block, end."""


@dataclass(frozen=True, slots=True)
class SessionShape:
    """What all parts of one inference session share. ``blocks`` are those of the whole session.

    With ``ends`` its inputs come with their token ids, and of its output only the last token's scores are wanted: then
    servers that run the model's ends can be in the chain.
    """

    blocks: range
    batch_size: int
    max_length: int
    ends: bool = False


class Part(Protocol):
    """One server's part of a session: its blocks, what they have seen, and the way to them.

    ``history`` holds the inputs of these blocks up to the session's position; the session appends to it when a step is
    complete over the whole chain, so the server may be ahead of it, never behind.
    """

    hop: Hop
    history: History

    @property
    def gives_scores(self) -> bool:
        """Whether it answers with scores of the last token, [batch, 1, vocabulary], in the place of hidden states."""
        ...

    @property
    def next_server(self) -> NextServer | None:
        """How a server before this one addresses pushes to it; None unless it is ready for one."""
        ...

    async def catch_up(self) -> list[Chunk]:
        """Make the server's cache hold the history; returns the outputs of whatever had to be replayed.

        Raises NetworkError or RemoteError.
        """
        ...

    async def step(
        self,
        chunk: Chunk,
        *,
        hypo_ids: torch.Tensor | None,
        step_id: str,
        next_servers: Sequence[NextServer] = (),
        tree: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run ``chunk`` through the server's blocks after catching up.

        With ``tree``, the parents of its tokens, they are candidates, and what follows is :meth:`accept` or another
        step, which forgets them. Raises NetworkError or RemoteError; TreesNotTaken if the server takes no such tree.
        After that, and when cancelled, it must be reset.
        """
        ...

    async def tree_tokens(self) -> int:
        """How many tokens a tree may have here; 0: no trees are taken. Raises NetworkError or RemoteError."""
        ...

    def accept(self, path: Sequence[int]) -> None:
        """Of the candidates of the last step these have become the session's, as ``history`` says already."""
        ...

    async def finish(self) -> None:
        """End the session in order. Never raises but Cancelled."""
        ...

    async def reset(self) -> None:
        """Drop what is at the server. Never raises, may be repeated."""
        ...


class OtherNetwork(Protocol):
    """Servers of the same model in another network, whose spans are whole."""

    name: str

    async def read(self) -> list[Span]:
        """Spans that are served now. Raises NetworkError or RemoteError."""
        ...

    async def ping(self, peer: PeerId) -> object:
        """Return once the peer answered. Raises NetworkError or RemoteError."""
        ...

    def part(self, hop: Hop, shape: SessionShape, history: History) -> Part:
        """A part of a session with ``ends``, of one sequence, at a server of this network."""
        ...
