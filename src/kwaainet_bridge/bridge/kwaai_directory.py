"""Who serves which blocks of a model in KwaaiNet, and whom its readers leave out, as spans of the client.

Source of the readers' rules: KwaaiNet v0.6.2; see :mod:`kwaainet_bridge.kwaai.records`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.client.directory import RecordSource, Span
from kwaainet_bridge.hivemind.client.survey import SurveyedModel, SwarmModel, survey
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState, block_uid
from kwaainet_bridge.kwaai import records
from kwaainet_bridge.kwaai.records import NodeInfo
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

KWAAINET: Final = "kwaainet"

_STATES: Final = {records.READY: ServerState.ONLINE, records.JOINING: ServerState.JOINING}


@dataclass(frozen=True, slots=True)
class ListedNode:
    """A node that has records of a model's blocks. ``left_out``: why readers pass it over, empty if they use it."""

    info: NodeInfo
    span: Span
    left_out: str


async def read_nodes(source: RecordSource, prefix: str, num_blocks: int) -> list[ListedNode]:
    """All nodes with records of the model, whatever their state. Raises what the record source raises.

    Of each node the newest record counts. Those that do not decode are left out, and those of a block that the node
    itself does not claim.
    """
    uids = [block_uid(prefix, block) for block in range(num_blocks)]
    found = await source.get_many(uids, latest=True)
    newest: dict[PeerId, tuple[float, NodeInfo]] = {}
    bad: list[str] = []
    for block, uid in enumerate(uids):
        record = found.get(uid)
        if record is None or not record.is_dictionary:
            continue
        for subkey, (value, expiration) in record.value.items():
            try:
                info = NodeInfo.from_value(subkey, value)
            except RemoteError as e:
                bad.append(f"{uid} by {subkey!r:.64}: {e}")
                continue
            is_newer = info.peer not in newest or expiration > newest[info.peer][0]
            if is_newer and info.start_block <= block < info.end_block:
                newest[info.peer] = expiration, info
    if bad:
        log.debug("%s: skipped %d bad node records, the first: %s", prefix, len(bad), bad[0])
    return [
        ListedNode(info, _span_of(info, num_blocks), why_left_out(info, num_blocks))
        for _, info in newest.values()
    ]


def why_left_out(info: NodeInfo, num_blocks: int) -> str:
    """Why a client passes a node over; empty if it does not."""
    if info.start_block >= info.end_block or info.end_block > num_blocks:
        return f"it claims the blocks {info.start_block}:{info.end_block} of {num_blocks}"
    if not records.is_known(info.version):
        return f"its version is {info.version[:40]!r}, not {records.LEAST_VERSION} or later"
    if info.state == records.READY:
        return ""
    meaning = {records.JOINING: ": it joins", 0: ": it joins or has left", -1: ": it is offline"}
    return f"its state is {info.state}{meaning.get(info.state, '')}, not {records.READY} (ready)"


def _span_of(info: NodeInfo, num_blocks: int) -> Span:
    described = ServerInfo(
        # 0 is a joining node of theirs and a stopped one of ours, -1 a stopped one of theirs
        _STATES.get(info.state, ServerState.OFFLINE),
        info.throughput,
        start_block=info.start_block,
        end_block=info.end_block,
        public_name=info.public_name or None,
        version=info.version,
        # theirs is of tokens through all of their blocks, Petals' of tokens through one
        inference_rps=info.throughput * (info.end_block - info.start_block) or None,
        torch_dtype=info.torch_dtype or None,
        using_relay=info.using_relay,
    )
    blocks = range(min(info.start_block, num_blocks), min(info.end_block, num_blocks))
    return Span(info.peer, blocks, described, network=KWAAINET, whole=True)


async def survey_kwaainet(source: RecordSource, models: Sequence[SwarmModel]) -> list[SurveyedModel]:
    """As :func:`kwaainet_bridge.hivemind.client.survey`, by KwaaiNet's rules; who is left out is told with the reason.

    ``cache_tokens_left`` is as the nodes announce it, None where they say 0 or nothing.
    """

    async def read(source: RecordSource, model: SwarmModel) -> SurveyedModel:
        nodes = await read_nodes(source, model.prefix, model.num_blocks)
        left_out = {node.info.peer: node.left_out for node in nodes if node.left_out}
        return SurveyedModel(model, tuple(map(_with_cache, nodes)), left_out=left_out)

    return await survey(source, models, read=read)


def _with_cache(node: ListedNode) -> Span:
    # not in the spans that routes are made of: there the number means what Petals' servers mean by it
    info = replace(node.span.info, cache_tokens_left=node.info.cache_tokens_left or None)
    return replace(node.span, info=info)


async def spans_for_choice(source: RecordSource, prefix: str, num_blocks: int) -> list[Span]:
    """Spans that a node which chooses its blocks has to reckon with: of nodes in use, and of those that join.

    A node that says 0 may have left and does not count. Raises what the record source raises.
    """
    nodes = await read_nodes(source, prefix, num_blocks)
    return [node.span for node in nodes if not node.left_out or node.info.state == records.JOINING]
