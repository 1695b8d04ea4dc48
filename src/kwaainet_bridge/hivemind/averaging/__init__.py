"""Averaging tensors with other peers, stock Hivemind averagers among them: groups, all-reduce, state download."""

from kwaainet_bridge.hivemind.averaging.averager import Averager
from kwaainet_bridge.hivemind.averaging.state import State, download_state
from kwaainet_bridge.hivemind.averaging.step import Phase, Status, Step, StepResult

__all__ = ["Averager", "Phase", "State", "Status", "Step", "StepResult", "download_state"]
