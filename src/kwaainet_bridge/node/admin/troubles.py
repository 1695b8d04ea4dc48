"""Peers that a node turned away, left alone or could not reach lately, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kwaainet_bridge.node.admin.models import seconds, text
from kwaainet_bridge.node.state import NodeState

if TYPE_CHECKING:
    from kwaainet_bridge.net import Libp2pHost


def troubles(state: NodeState, host: Libp2pHost) -> list[dict[str, Any]]:
    """All that is known of them, by kind, the latest of each kind first."""
    return [*_refused(state, host), *_banned(state), *_avoided(state), *_unreachable(state, host)]


def _row(
    kind: str, peer: object, where: str, reason: str, *, times: int = 1, **when: float | None
) -> dict[str, Any]:
    told = {"at": None, "seconds_left": None} | when
    return {
        "kind": kind,
        "peer": str(peer),
        "where": where,
        "reason": text(reason),
        "times": times,
        **{name: _told(value) for name, value in told.items()},
    }


def _told(value: float | None) -> float | None:
    """A time; None for one that JSON cannot write, since a peer says for how long it is to be left alone."""
    return None if value is None or not math.isfinite(value) else seconds(value)


def _refused(state: NodeState, host: Libp2pHost) -> Iterator[dict[str, Any]]:
    for one in host.refused.latest:
        yield _row("refused", one.who, one.scope, one.reason, times=one.times, at=state.unix_time(one.at))


def _banned(state: NodeState) -> Iterator[dict[str, Any]]:
    for run, status in state.averaging.items():
        for ban in reversed(status().counts.bans):
            yield _row("banned", ban.peer, f"averaging {run}", f"{ban.kind.value}: {ban.reason}", at=ban.at)


def _avoided(state: NodeState) -> Iterator[dict[str, Any]]:
    """Servers with whom its own generation failed."""
    swarms = {} if state.texts is None else state.texts.swarms()
    for model, swarm in swarms.items():
        for one in swarm.avoided():
            yield _row("avoided", one.peer, f"{model} in {one.network}", one.reason, seconds_left=one.seconds)


def _unreachable(state: NodeState, host: Libp2pHost) -> Iterator[dict[str, Any]]:
    connected = set(host.connected_peers())
    for peer, result in host.unreachable():
        if peer not in connected:
            yield _row(
                "unreachable",
                peer,
                result.address.transport,
                f"{result.hop}: {result.error}",
                times=result.failures,
                at=state.unix_time(result.at),
                seconds_left=max(0.0, result.retry_at - state.now),
            )
