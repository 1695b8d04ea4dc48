"""Averaging tensors with other peers, stock Hivemind averagers among them: groups, all-reduce, state download."""

from kwaainet_bridge.hivemind.averaging.allreduce import Options
from kwaainet_bridge.hivemind.averaging.averager import Averager, StepResult
from kwaainet_bridge.hivemind.averaging.matchmaking import Rules
from kwaainet_bridge.hivemind.averaging.state import State

__all__ = ["Averager", "Options", "Rules", "State", "StepResult"]
