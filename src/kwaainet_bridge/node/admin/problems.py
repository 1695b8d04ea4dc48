"""What is wrong with a node, each with what its operator can do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kwaainet_bridge.node.readiness import conditions
from kwaainet_bridge.node.state import NodeState, Phase


@dataclass(frozen=True, slots=True)
class Problem:
    """A condition that degrades the node or keeps it from being ready, why, and what helps.

    ``model`` is the key of the model that it is about, None for the whole node.
    """

    name: str
    reason: str
    remedy: str
    model: str | None = None


_REMEDIES: Final = {
    "reachable": (
        "Run kwaainet-bridge doctor with this configuration on this machine: it tries each way in "
        "and names the step that fails."
    ),
    "clock": "Set this machine's clock by NTP; on Linux: timedatectl set-ntp true.",
    "engine": "Keep the log, then restart the node: without its engine it computes nothing.",
    "blocks": "The log says what keeps the blocks from being loaded.",
    "placement": (
        "Make room as the reason says, or name the blocks to serve as model.blocks. It is tried again by itself."
    ),
    "bootstrap": (
        "Check this machine's way out, and that the peers of networks.{rest}.bootstrap are up; the log names "
        "the step that fails with each. It is tried again by itself."
    ),
    "announced": (
        "See what the peers answered; if none was asked, name a peer that is up in networks.{rest}.bootstrap. "
        "It is tried again every 2 minutes."
    ),
    "idle": (
        "See what the driver says; with idle.watch: off the node does not look. It is tried again every 5 seconds."
    ),
    "averaging": (
        "See that a peer of the run {rest} is up and shares its state, and that the prefix of the run is the one "
        "it uses. It is tried again by itself."
    ),
}

_OTHERWISE: Final = "The log says more."


def remedy_of(name: str) -> str:
    """What helps when a condition of this name is not met."""
    kind, _, rest = name.partition(" ")
    # not str.format: names come from the configuration
    return _REMEDIES.get(kind, _OTHERWISE).replace("{rest}", rest)


def problems(state: NodeState) -> tuple[Problem, ...]:
    """All that degrades the node; while it serves, also what else keeps it from being ready."""
    reasons = {
        (None if model is None else model.key, condition): why
        for model, condition, why in state.degradations()
    }
    if state.phase is Phase.SERVING:
        for condition in conditions(state):
            if not condition.met:
                reasons.setdefault((condition.model, condition.name), condition.reason)
    return tuple(Problem(name, why, remedy_of(name), model) for (model, name), why in reasons.items())
