"""KwaaiNet's servers in the chains of the client: who they are, and a session's part at one of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.kwaai_directory import KWAAINET, read_nodes
from kwaainet_bridge.errors import (
    InvalidRequest,
    LeaseDenied,
    ProtocolNotSupported,
    RemoteError,
    TreesNotTaken,
)
from kwaainet_bridge.hivemind.client.directory import RecordSource, Span
from kwaainet_bridge.hivemind.client.history import Chunk, History
from kwaainet_bridge.hivemind.client.part import NextServer, SessionShape
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.methods import most_tokens
from kwaainet_bridge.wire.kwaai_lease import Denial
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


class KwaaiServers:
    """The servers of one model in KwaaiNet, as ``Swarm`` takes other networks.

    ``source`` is a view of KwaaiNet's DHT; ``prefix`` is what the model's blocks are called there. ``vocab_size`` is
    how many scores a server of the last block must give, ``step_seconds`` how long any may take for one answer.
    """

    name = KWAAINET

    def __init__(
        self,
        source: RecordSource,
        client: KwaaiClient,
        prefix: str,
        num_blocks: int,
        *,
        vocab_size: int,
        step_seconds: float = defaults.CLIENT_STEP_SECONDS,
        rng: random.Random | None = None,
    ) -> None:
        self.prefix = prefix
        self._source = source
        self._client = client
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._step_seconds = step_seconds
        self._rng = rng or random.SystemRandom()
        self._lessors: frozenset[PeerId] = frozenset()

    async def read(self) -> list[Span]:
        """Spans of nodes that KwaaiNet's own clients would use. Raises what the record source raises."""
        nodes = await read_nodes(self._source, self.prefix, self._num_blocks)
        usable = [node for node in nodes if not node.left_out]
        self._lessors = frozenset(node.info.peer for node in usable if node.info.leases)
        return [node.span for node in usable]

    async def ping(self, peer: PeerId) -> object:
        return await self._client.hello(peer)

    def part(self, hop: Hop, shape: SessionShape, history: History) -> KwaaiPart:
        return KwaaiPart(
            self._client,
            hop,
            shape,
            history,
            scores=self._vocab_size if hop.blocks.stop == self._num_blocks else None,
            leases_as=self.prefix if hop.peer in self._lessors else None,
            step_seconds=self._step_seconds,
            new_number=lambda: self._rng.getrandbits(63),
        )


class KwaaiPart:
    """A session at one KwaaiNet server: a number, which begins anew whenever the server's cache is not as it should be.

    The protocol cannot go back, and has no message that ends a session: the server forgets it after a while.
    """

    def __init__(
        self,
        client: KwaaiClient,
        hop: Hop,
        shape: SessionShape,
        history: History,
        *,
        scores: int | None,
        leases_as: str | None,
        step_seconds: float,
        new_number: Callable[[], int],
    ) -> None:
        """``scores``: how many it gives of the last token, None unless it has the model's last block.

        ``leases_as``: the model of which a lease is asked before the session begins, None at a server without leases.
        """
        if not shape.ends or shape.batch_size != 1:
            raise InvalidRequest("KwaaiNet's servers take sessions of one sequence with the model's ends")
        self.hop = hop
        self.history = history
        self._client = client
        self._first = hop.blocks.start == 0
        self._scores = scores
        self._leases_as = leases_as
        self._step_seconds = step_seconds
        self._new_number = new_number
        self._number: int | None = None
        self._position = 0

    @property
    def gives_scores(self) -> bool:
        return self._scores is not None

    @property
    def next_server(self) -> NextServer | None:
        return None  # pushes are Petals' alone

    async def catch_up(self) -> list[Chunk]:
        tokens = self.history.tokens
        if self._number is not None and self._position > tokens:
            await self.reset()
        if self._number is not None:
            return []
        await self._lease()
        self._number, self._position = self._new_number(), 0
        return [Chunk(await self._run(piece)) for piece in self.history.pieces(defaults.PREFILL_TOKENS)]

    async def step(
        self,
        chunk: Chunk,
        *,
        hypo_ids: torch.Tensor | None,
        step_id: str,  # noqa: ARG002 - the protocol has neither steps' names nor pushes
        next_servers: Sequence[NextServer] = (),  # noqa: ARG002
        tree: Sequence[int] | None = None,
    ) -> torch.Tensor:
        assert hypo_ids is None, "sessions with the model's ends have none"
        if tree is not None:
            raise TreesNotTaken(
                f"{self.hop}: KwaaiNet's protocol knows no trees: take steps of single tokens"
            )
        await self.catch_up()
        return await self._run(chunk)

    async def tree_tokens(self) -> int:
        return 0  # the protocol knows none

    def accept(self, path: Sequence[int]) -> None:
        assert not path, "no step had a tree"

    async def _lease(self) -> None:
        """Have the server keep a place for the session; what it began goes on without a lease. Raises LeaseDenied."""
        if self._leases_as is None:
            return
        try:
            await self._client.lease(self.hop.peer, self._leases_as)
        except ProtocolNotSupported as e:
            log.debug("%s: it announces leases and has none: %s", self.hop, e)
        except LeaseDenied as e:
            if e.reason in (Denial.AT_CAPACITY, Denial.WRONG_MODEL):
                raise
            log.debug("%s: begins without a lease: %s", self.hop, e)

    async def _run(self, chunk: Chunk) -> torch.Tensor:
        """The server's outputs for these tokens, in as many requests as its messages can hold."""
        # its answer may have half as many bytes again: lists of integers
        limit = max(1, most_tokens(chunk.hidden.shape[2]) * 2 // 3)
        outputs = [
            await self._exchange(chunk.tail(start).head(limit)) for start in range(0, chunk.tokens, limit)
        ]
        if self._scores is not None:
            return outputs[-1] if outputs else chunk.hidden
        return torch.cat(outputs, dim=1) if outputs else chunk.hidden

    async def _exchange(self, chunk: Chunk) -> torch.Tensor:
        assert self._number is not None
        if self._first:
            assert chunk.ids is not None, "a session with the model's ends has the ids of all tokens"
            ids = [int(token) for token in chunk.ids[0]]
            output = await self._client.step_ids(
                self.hop.peer, self._number, self._position, ids, timeout=self._step_seconds
            )
        else:
            output = await self._client.step_hidden(
                self.hop.peer, self._number, self._position, chunk.hidden, timeout=self._step_seconds
            )
        expected = chunk.hidden.shape if self._scores is None else (1, 1, self._scores)
        if tuple(output.shape) != tuple(expected):
            raise RemoteError(f"{self.hop}: values of shape {list(output.shape)}, expected {list(expected)}")
        if not bool(torch.isfinite(output).all()):
            raise RemoteError(f"{self.hop}: values that are not finite")
        self._position += chunk.tokens
        return output.to(chunk.hidden.dtype)

    async def finish(self) -> None:
        self._number = None

    async def reset(self) -> None:
        self._number, self._position = None, 0
