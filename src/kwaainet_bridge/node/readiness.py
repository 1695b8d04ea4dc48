"""Whether a node is ready: each condition by its name, judged from the node's state alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.models import shown
from kwaainet_bridge.node.state import CLOCK, NodeState, Phase

ENGINE: Final = "engine"
REACHABLE: Final = "reachable"
BLOCKS: Final = "blocks"


def announced_in(network: str) -> str:
    """The condition that the blocks are announced in ``network``."""
    return f"announced {network}"


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that must hold for a node to be ready. ``reason`` says why it does or does not."""

    name: str
    met: bool
    reason: str


def conditions(state: NodeState) -> tuple[Condition, ...]:
    """All that must hold, each with its reason. The node is ready when all are met."""
    return (
        _serving(state),
        *_blocks(state),
        _unless_degraded(state, REACHABLE, ": ".join(state.reachability)),
        _unless_degraded(state, CLOCK, "no bootstrap peer says otherwise"),
        *_announced(state),
    )


def is_ready(judged: Iterable[Condition]) -> bool:
    """Whether :func:`conditions` are all met."""
    return all(condition.met for condition in judged)


def _serving(state: NodeState) -> Condition:
    seconds = state.now - state.since
    return Condition("serving", state.phase is Phase.SERVING, f"{state.phase.value} for {seconds:.0f} s")


def _unless_degraded(state: NodeState, name: str, otherwise: str) -> Condition:
    wrong = state.degraded.get(name)
    return Condition(name, wrong is None, otherwise if wrong is None else wrong)


def _blocks(state: NodeState) -> Iterator[Condition]:
    """Of a node that is to serve some."""
    if not state.announces:
        return
    if state.served is None:
        yield Condition(BLOCKS, False, f"not loaded: {state.phase.value}")
        return
    blocks = state.served.engine.blocks
    yield Condition(BLOCKS, True, f"{shown(blocks)} are loaded")
    yield _unless_degraded(state, ENGINE, "it computes")


def _announced(state: NodeState) -> Iterator[Condition]:
    """An announcement holds if another node keeps it, or none is to be there, and for as long as records live."""
    for network in state.announces:
        name, known, watch = announced_in(network), state.announced.get(network), state.bootstrap.get(network)
        if known is None:
            yield Condition(name, False, "nothing was announced yet")
            continue
        report, age = known.last, state.now - known.at
        told = f"{report.by_others} of {report.records} records kept by others, {age:.0f} s ago"
        if report.state is not ServerState.ONLINE:
            yield Condition(name, False, f"announced as {report.state.name}: {told}")
        elif age > report.lifetime:
            yield Condition(name, False, f"the records have expired: {told}")
        elif not report.by_others and watch is not None and watch.total:
            yield Condition(
                name, False, f"nobody in the network knows of these blocks: {report.told_by_peers}"
            )
        else:
            yield _unless_degraded(state, name, told)
