"""Who serves which blocks of a model, as the DHT tells it.

Every server stores, for each block it holds, a record under the block's name and its own peer id. The record
describes the server's whole span, so one surviving record is enough to use all of it.
Source: Petals main, ``utils/dht.py`` (``get_remote_module_infos``, ``compute_spans``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState, block_uid, check_prefix
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

PETALS: Final = "petals"
"""The network whose servers this package's own calls reach."""


class Record(Protocol):
    """What a DHT lookup found. For a dictionary, ``value`` maps subkeys to (value, expiration)."""

    @property
    def value(self) -> Any: ...

    @property
    def is_dictionary(self) -> bool: ...


class RecordSource(Protocol):
    """The part of a DHT node that the directory needs."""

    async def get_many(self, keys: Sequence[Any], *, latest: bool = True) -> Mapping[Any, Record | None]: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks that one server holds, or is about to; ``info.state`` says whether it serves them.

    One that is ``whole`` runs all of its blocks or none, and has the model's ends with them: with block 0 it takes
    token ids, with the last block it gives scores of the last token.
    """

    peer: PeerId
    blocks: range
    info: ServerInfo
    network: str = PETALS
    whole: bool = False


@dataclass(frozen=True, slots=True)
class _Claim:
    """One server's record of one block, and when it expires: the later, the newer."""

    block: int
    info: ServerInfo
    expiration: float


class Directory:
    """Reads the spans of one model. Keeps nothing between readings.

    ``allowed`` restricts it to those peers (None: everyone), ``blocked`` takes peers out, ``adapter`` keeps
    only servers that have loaded that adapter.
    """

    def __init__(
        self,
        source: RecordSource,
        prefix: str,
        num_blocks: int,
        *,
        allowed: Collection[PeerId] | None = None,
        blocked: Collection[PeerId] = (),
        adapter: str | None = None,
    ) -> None:
        self.prefix = check_prefix(prefix)
        self.num_blocks = num_blocks
        self.adapter = adapter
        self._source = source
        self._allowed = None if allowed is None else frozenset(allowed)
        self._blocked = frozenset(blocked)

    async def read(self, *, states: Collection[ServerState] = (ServerState.ONLINE,)) -> list[Span]:
        """Look up all blocks and return the spans of servers that are in one of ``states``, one per peer.

        Records that do not decode are left out and logged. Raises what the record source raises.
        """
        uids = [block_uid(self.prefix, block) for block in range(self.num_blocks)]
        found = await self._source.get_many(uids, latest=True)
        records = {block: found.get(uid) for block, uid in enumerate(uids)}
        spans = spans_of(self.prefix, self.num_blocks, records)
        return [span for span in spans if span.info.state in states and self._admits(span)]

    def _admits(self, span: Span) -> bool:
        return (
            (self._allowed is None or span.peer in self._allowed)
            and span.peer not in self._blocked
            and (self.adapter is None or self.adapter in span.info.adapters)
        )


def spans_of(prefix: str, num_blocks: int, records: Mapping[int, Record | None]) -> list[Span]:
    """Turn the records of a model's blocks into spans, one per server in whatever state, clipped to the model."""
    claims: dict[PeerId, list[_Claim]] = {}
    bad: list[str] = []
    for block, record in records.items():
        for peer, claim in _claims_of(prefix, block, record, bad):
            claims.setdefault(peer, []).append(claim)
    if bad:
        log.warning("%s: skipped %d bad server records, the first: %s", prefix, len(bad), bad[0])
    spans = []
    for peer, own in claims.items():
        # a server that moved or restarted leaves older records behind, which live on for minutes
        newest = max(claim.expiration for claim in own)
        current = [claim for claim in own if claim.expiration == newest]
        info = max(current, key=lambda claim: claim.info.state).info
        spans.append(Span(peer, _blocks_of(info, (claim.block for claim in current), num_blocks), info))
    return spans


def _claims_of(
    prefix: str, block: int, record: Record | None, bad: list[str]
) -> Iterator[tuple[PeerId, _Claim]]:
    if record is None:
        return
    if not record.is_dictionary:
        bad.append(f"{block_uid(prefix, block)} is no dictionary")
        return
    for subkey, (value, expiration) in record.value.items():
        try:
            yield _peer_of(subkey), _Claim(block, _info_of(value, block), expiration)
        except RemoteError as e:
            bad.append(f"{block_uid(prefix, block)} by {subkey!r:.64}: {e}")


def _peer_of(subkey: Any) -> PeerId:
    if not isinstance(subkey, str):
        raise RemoteError("the subkey is no peer id")
    return PeerId.parse(subkey)


def _info_of(value: Any, block: int) -> ServerInfo:
    info = ServerInfo.from_value(value)
    start, end = info.start_block, info.end_block
    if start is not None and end is not None and not start <= block < end:
        raise RemoteError(f"the span {start}:{end} does not hold the block itself")
    return info


def _blocks_of(info: ServerInfo, recorded: Iterable[int], num_blocks: int) -> range:
    """The span a record states, or else the longest run of blocks that have records."""
    if info.start_block is not None and info.end_block is not None:
        return range(info.start_block, min(info.end_block, num_blocks))
    best = range(0)
    run = range(0)
    for block in sorted(recorded):
        run = range(run.start, block + 1) if run and block == run.stop else range(block, block + 1)
        best = max(best, run, key=len)
    return best
