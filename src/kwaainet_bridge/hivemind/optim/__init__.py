"""Training one model with other peers, stock ``hivemind.Optimizer`` peers among them."""

from kwaainet_bridge.hivemind.optim.optimizer import CollaborativeOptimizer, EpochEnd
from kwaainet_bridge.hivemind.optim.progress import SwarmProgress

__all__ = ["CollaborativeOptimizer", "EpochEnd", "SwarmProgress"]
