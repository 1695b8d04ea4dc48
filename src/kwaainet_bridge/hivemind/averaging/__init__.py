"""Averaging tensors with other peers, stock Hivemind averagers among them: groups, all-reduce, state download."""

from kwaainet_bridge.hivemind.averaging.averager import Averager
from kwaainet_bridge.hivemind.averaging.dialect import Dialect, Protocol, dialect_of
from kwaainet_bridge.hivemind.averaging.state import State, download_state
from kwaainet_bridge.hivemind.averaging.step import (
    Ban,
    Counts,
    FailureKind,
    Outcome,
    Phase,
    Status,
    Step,
    StepResult,
)

__all__ = [
    "Averager",
    "Ban",
    "Counts",
    "Dialect",
    "FailureKind",
    "Outcome",
    "Phase",
    "Protocol",
    "State",
    "Status",
    "Step",
    "StepResult",
    "dialect_of",
    "download_state",
]
