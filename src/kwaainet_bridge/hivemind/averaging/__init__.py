"""Averaging tensors with other peers, stock Hivemind averagers among them: groups, all-reduce, state download."""

from kwaainet_bridge.hivemind.averaging.averager import Averager
from kwaainet_bridge.hivemind.averaging.dialect import Dialect, Protocol, dialect_of
from kwaainet_bridge.hivemind.averaging.state import State, download_state
from kwaainet_bridge.hivemind.averaging.step import Phase, Status, Step, StepResult

__all__ = [
    "Averager",
    "Dialect",
    "Phase",
    "Protocol",
    "State",
    "Status",
    "Step",
    "StepResult",
    "dialect_of",
    "download_state",
]
