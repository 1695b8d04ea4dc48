"""The model engine: checkpoints, blocks, KV cache, compute thread. Takes and gives tensors; knows no
network."""

from __future__ import annotations

from kwaainet_bridge.engine.adapters import names_of
from kwaainet_bridge.engine.client_weights import ClientModel, load_client_weights
from kwaainet_bridge.engine.config import Choose, EngineConfig, LoadProgress, ModelInfo, ModelOutline, Storage
from kwaainet_bridge.engine.core import Engine
from kwaainet_bridge.engine.offload import OffloadUse
from kwaainet_bridge.engine.prefix import PrefixUse
from kwaainet_bridge.engine.session import Session
from kwaainet_bridge.engine.snapshots import ServedSession, SessionSnapshot
from kwaainet_bridge.engine.tree import Tree, plant
from kwaainet_bridge.engine.weights.cache import WeightCache, cache_of

__all__ = [
    "Choose",
    "ClientModel",
    "Engine",
    "EngineConfig",
    "LoadProgress",
    "ModelInfo",
    "ModelOutline",
    "OffloadUse",
    "PrefixUse",
    "ServedSession",
    "Session",
    "SessionSnapshot",
    "Storage",
    "Tree",
    "WeightCache",
    "cache_of",
    "load_client_weights",
    "names_of",
    "plant",
]
