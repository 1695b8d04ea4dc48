"""Averaging tensors with other peers, stock Hivemind averagers among them: groups, all-reduce, state download."""

from kwaainet_bridge.hivemind.averaging.averager import Averager
from kwaainet_bridge.hivemind.averaging.state import State
from kwaainet_bridge.hivemind.averaging.step import Phase, Step, StepResult

__all__ = ["Averager", "Phase", "State", "Step", "StepResult"]
