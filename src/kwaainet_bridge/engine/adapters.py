"""LoRA adapters as peft saves them: a configuration, and two small matrices beside each matrix that they change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kwaainet_bridge.engine.checkpoint import REPOSITORY, Download
from kwaainet_bridge.errors import CheckpointError, ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TENSOR = re.compile(r"(?P<path>.+\.(?P<block>\d+)\.(?P<module>.+))\.lora_(?P<side>[AB])(\.default)?\.weight")
OF_BLOCK = re.compile(r".+\.(layers|h)\.(?P<block>\d+)\..+")
REFUSED = {
    "use_dora": "it is a DoRA adapter",
    "fan_in_fan_out": "its matrices are the other way round (fan_in_fan_out)",
    "modules_to_save": "it replaces whole modules (modules_to_save)",
    "megatron_config": "it is of Megatron",
}


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What an adapter adds to a linear layer: ``scale * (x @ down.T) @ up.T``; down [r, in], up [out, r]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def name_of(source: str) -> str:
    """What an adapter is called on the wire: its repository, or the last part of its folder's path."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def names_of(sources: Sequence[str]) -> tuple[str, ...]:
    """The names of all. Raises ConfigError if two are called the same."""
    names = tuple(name_of(source) for source in sources)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"model.adapters: two are called {twice}: rename the folder of one of them")
    return names


class Adapter:
    """One adapter's files. Opening blocks on the disk, or for a hub repository on the network."""

    def __init__(self, source: str, *, download: Download) -> None:
        """Raise CheckpointError for what is no LoRA adapter, or one that does more than add to linear layers."""
        self.name = name_of(source)
        folder = Path(source)
        if folder.is_dir():
            config, weights = folder / CONFIG, folder / WEIGHTS
        elif REPOSITORY.fullmatch(source):
            fetched = [download(source, file, None) for file in (CONFIG, WEIGHTS)]
            config, weights = (
                path or folder / file for path, file in zip(fetched, (CONFIG, WEIGHTS), strict=True)
            )
        else:
            raise CheckpointError(f"adapter {source} is neither a folder nor a repository id like org/name")
        self._file = weights
        self._config = self._read_config(config)
        self._keys: dict[int, dict[str, dict[str, str]]] = {}
        """Of each block and module: the names of its two tensors."""
        self._find_keys()

    def check(self, num_blocks: int) -> None:
        """Raise CheckpointError if it is for a model with more blocks."""
        if (last := max(self._keys)) >= num_blocks:
            raise self._refused(f"it changes block {last}, and the model has blocks 0:{num_blocks}")

    def of(self, block: int, dtype: torch.dtype, device: torch.device) -> dict[str, Pair]:
        """What is added to which modules of a block, by their names inside of it."""
        return {
            module: self._pair(block, module, sides, dtype, device)
            for module, sides in self._keys.get(block, {}).items()
        }

    def _pair(
        self, block: int, module: str, sides: dict[str, str], dtype: torch.dtype, device: torch.device
    ) -> Pair:
        if sides.keys() != {"A", "B"}:
            raise self._refused(f"{module} of block {block} has one of its two matrices only")
        with self._open() as file:
            down, up = (file.get_tensor(sides[side]) for side in "AB")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise self._refused(
                f"the matrices of {module} of block {block} have shapes {list(down.shape)}, {list(up.shape)}"
            )
        alpha = self._alpha(module)
        rank = down.shape[0]
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return Pair(down.to(device, dtype), up.to(device, dtype), scale)

    def _alpha(self, module: str) -> float:
        for pattern, alpha in (self._config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(alpha)
        return float(self._config["lora_alpha"])

    def _read_config(self, path: Path) -> dict[str, Any]:
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise self._refused(f"{CONFIG} cannot be read: {e}") from e
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise self._refused("it is no LoRA adapter (peft_type)")
        for key, why in REFUSED.items():
            if config.get(key):
                raise self._refused(why)
        if config.get("bias") not in (None, "none"):
            raise self._refused("it changes biases (bias)")
        alpha = config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise self._refused(f"lora_alpha is {alpha!r:.40}")
        return config

    def _find_keys(self) -> None:
        with self._open() as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if OF_BLOCK.fullmatch(key) is None:
                    continue  # embeddings and head are the clients'
                match = TENSOR.fullmatch(key)
                if match is None:
                    raise self._refused(f"it has {key}, which is no matrix of LoRA")
                modules = self._keys.setdefault(int(match["block"]), {})
                modules.setdefault(match["module"], {})[match["side"]] = key
        if not self._keys:
            raise self._refused("it changes no layer of any block")

    def _open(self) -> Any:
        try:
            return safe_open(self._file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise self._refused(f"{self._file.name} cannot be read: {e}") from e

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"adapter {self.name} cannot be served: {why}")
