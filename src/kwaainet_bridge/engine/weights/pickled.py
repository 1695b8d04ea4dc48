"""Pickled weights, for those who ask for them: tensors alone are read, and nothing in the file is run."""

from __future__ import annotations

import pickle
from collections.abc import KeysView
from pathlib import Path

import torch

from kwaainet_bridge.errors import CheckpointError


class PickledFile:
    """A file of torch.save. Its tensors are views of the mapped file."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError for a file that holds anything but tensors by name."""
        self._path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as e:
            raise CheckpointError(
                f"{path} cannot be read as weights alone ({str(e).partition(chr(10))[0]}): "
                "convert the model to safetensors"
            ) from e
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise CheckpointError(f"{path} holds no tensors by name: convert the model to safetensors")
        self._tensors: dict[str, torch.Tensor] = tensors

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]
