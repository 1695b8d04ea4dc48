"""The engine's settings, as a model's configuration gives them."""

from __future__ import annotations

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import EngineConfig
from kwaainet_bridge.node.models import model_source, storage_of
from kwaainet_bridge.wire.peer_id import PeerId


def engine_settings(config: ModelConfig, blocks: range | None) -> EngineConfig:
    """For ``blocks`` of the model, None for all."""
    return EngineConfig(
        model=model_source(config.name),
        blocks=blocks,
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        device=config.device,
        cache_tokens=config.cache_tokens,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        threads=config.threads,
        tensor_parallel=config.tensor_parallel,
        quantization=config.quantization,
        shares={PeerId.parse(peer): share for peer, share in config.shares.items()},
        adapters=config.adapters,
        share_prefixes=config.share_prefixes,
        storage=storage_of(config),
        offload_idle_seconds=config.offload_idle_seconds,
        offload_bytes=config.offload_mib * defaults.MIB,
    )
