"""Whether a node is ready: each condition by its name, judged from the node's state alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.model_state import ModelState
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
    """Something that must hold for a node to be ready. ``reason`` says why it does or does not.

    ``model`` is the key of the model that it is about, None for the whole node.
    """

    name: str
    met: bool
    reason: str
    model: str | None = None


def conditions(state: NodeState) -> tuple[Condition, ...]:
    """All that must hold, each with its reason. The node is ready when all are met."""
    return (
        _serving(state),
        *(condition for model in state.models.values() for condition in _blocks(model)),
        _unless_degraded(state, REACHABLE, ": ".join(state.reachability)),
        _unless_degraded(state, CLOCK, "no bootstrap peer says otherwise"),
        *(condition for model in state.models.values() for condition in _announced(state, model)),
    )


def is_ready(judged: Iterable[Condition]) -> bool:
    """Whether :func:`conditions` are all met."""
    return all(condition.met for condition in judged)


def _serving(state: NodeState) -> Condition:
    seconds = state.now - state.since
    told = f"{state.phase.value} for {seconds:.0f} s"
    if state.phase is Phase.PAUSED and state.pausing.reason is not None:
        told += f": {state.pausing.reason}"
    return Condition("serving", state.phase is Phase.SERVING, told)


def _unless_degraded(of: NodeState | ModelState, name: str, otherwise: str) -> Condition:
    wrong = of.degraded.get(name)
    model = of.key if isinstance(of, ModelState) else None
    return Condition(name, wrong is None, otherwise if wrong is None else wrong, model)


def _blocks(model: ModelState) -> Iterator[Condition]:
    if model.served is None:
        wrong = model.degraded.get(BLOCKS, model.phase.value)
        yield Condition(BLOCKS, False, f"not loaded: {wrong}", model.key)
        return
    blocks = model.served.engine.blocks
    yield Condition(BLOCKS, True, f"{shown(blocks)} are loaded", model.key)
    yield _unless_degraded(model, ENGINE, "it computes")


def _announced(state: NodeState, model: ModelState) -> Iterator[Condition]:
    """An announcement holds if another node keeps it, or none is to be there, and for as long as records live."""
    for network in model.announces:
        name, known, watch = announced_in(network), model.announced.get(network), state.bootstrap.get(network)
        if known is None:
            yield Condition(name, False, "nothing was announced yet", model.key)
            continue
        report, age = known.last, state.now - known.at
        told = f"{report.by_others} of {report.records} records kept by others, {age:.0f} s ago"
        wrong = None
        if report.state is not ServerState.ONLINE:
            wrong = f"announced as {report.state.name}: {told}"
        elif age > report.lifetime:
            wrong = f"the records have expired: {told}"
        elif not report.by_others and watch is not None and watch.total:
            wrong = f"nobody in the network knows of these blocks: {report.told_by_peers}"
        if wrong is not None:
            yield Condition(name, False, wrong, model.key)
        else:
            yield _unless_degraded(model, name, told)
