"""What the engine is asked to serve, and what it says about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Quantization = Literal["none", "int8", "nf4"]
"""What becomes of large matrices: nothing, eight bits for each weight, or four."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How weights of models are kept and read.

    Tensors of hub repositories lie in ``cache_dir`` (None: in the user's cache folder), of ``cache_quota`` bytes at
    most (None: what the disk has). ``allow_pickled``: pickled weights are read, too, as tensors alone.
    """

    cache_dir: Path | None = None
    cache_quota: int | None = None
    allow_pickled: bool = False


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One model, one span of its blocks.

    ``model`` is a folder in the Hugging Face layout or a hub repository id; ``revision`` concerns the
    latter. ``blocks`` None serves all. ``dtype`` "auto" keeps the checkpoint's. ``cache_tokens`` is the
    room of the KV cache for all sessions together: tokens of one sequence through all served blocks.
    ``max_length`` is in tokens per session, ``max_batch_tokens`` in batch times tokens per forward or
    backward request. ``threads`` is what one torch operator may use on the CPU; None leaves torch's choice.
    ``tensor_parallel`` is how many processes of this machine share the model: with "cuda" for a device each has a GPU
    of its own, from the first on. ``quantization`` keeps large matrices in fewer bits. ``adapters`` are LoRA
    adapters, folders or hub repository ids.
    ``share_prefixes`` says which sessions compute a common beginning once: those of one peer, all, or none.
    Sessions that were idle for ``offload_idle_seconds`` (None: none) leave the KV cache where others need the room, for
    ``offload_bytes`` of the host's memory. While several peers wait, those in ``shares`` get so many times what
    others get.
    """

    model: str
    blocks: range | None = None
    dtype: torch.dtype | Literal["auto"] = "auto"
    device: str = "cpu"
    cache_tokens: int = defaults.CACHE_TOKENS
    max_length: int = defaults.MAX_LENGTH
    max_batch_tokens: int = defaults.MAX_BATCH_TOKENS
    threads: int | None = None
    tensor_parallel: int = 1
    share_prefixes: Literal["off", "peer", "all"] = "peer"
    offload_idle_seconds: float | None = None
    offload_bytes: int = defaults.OFFLOAD_MIB * defaults.MIB
    quantization: Quantization = "none"
    adapters: tuple[str, ...] = ()
    storage: Storage = field(default_factory=Storage)
    shares: Mapping[Hashable, float] = field(default_factory=dict)
    revision: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that no model could serve."""
        if self.dtype != "auto" and self.dtype not in SUPPORTED_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            raise ConfigError(f"dtype {self.dtype} is not supported: choose one of {known}, or auto")
        for name in ("cache_tokens", "max_length", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.tensor_parallel > 1 and self.device not in ("cpu", "cuda"):
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} takes the first GPUs: give cuda for a device, "
                f"not {self.device}"
            )
        if self.share_prefixes not in ("off", "peer", "all"):
            raise ConfigError(f"share_prefixes must be off, peer or all, got {self.share_prefixes}")
        if self.offload_idle_seconds is not None and self.tensor_parallel > 1:
            raise ConfigError("offload_idle_seconds does not go with tensor_parallel: leave one of them out")
        if self.tensor_parallel > 1 and self.quantization != "none":
            raise ConfigError("quantization does not go with tensor_parallel: leave one of them out")
        if self.tensor_parallel > 1 and self.adapters:
            raise ConfigError("adapters do not go with tensor_parallel: leave one of them out")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")

    def device_of(self, rank: int) -> str:
        """Where the process number ``rank`` of those that share the model computes."""
        return f"cuda:{rank}" if self.device == "cuda" and self.tensor_parallel > 1 else self.device


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """What a model's configuration alone tells, before any weights are read or fetched.

    ``family`` is the checkpoint's ``model_type``.
    """

    family: str
    num_blocks: int


Choose = Callable[[ModelOutline], Awaitable[range]]
"""Decides which blocks of a model to serve."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The whole model, whatever span of it is served.

    ``repository`` is the hub id, None for a local folder. ``family`` is the checkpoint's ``model_type``.
    ``dtype`` is the engine's: what hidden states, answers and the KV cache are made of. ``no_ends`` says why what is
    before the first block and after the last cannot be computed here; None if it can.
    """

    name: str
    repository: str | None
    family: str
    hidden_size: int
    num_blocks: int
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    no_ends: str | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading is: first tensors are fetched, then blocks are read. Bytes of blocks are those of the loaded
    weights; ``fetched_bytes`` are of the ``missing_bytes`` that were not on this machine."""

    blocks_done: int
    blocks_total: int
    bytes_done: int
    bytes_total: int
    fetched_bytes: int = 0
    missing_bytes: int = 0
