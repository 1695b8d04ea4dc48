"""Pickled weights, for those who ask for them: tensors alone are read, and nothing in the file is run."""

from __future__ import annotations

import pickle
from collections.abc import KeysView
from pathlib import Path
from typing import Self

import torch

from kwaainet_bridge.errors import CheckpointError


class PickledSlice:
    """What safetensors calls a slice, of a tensor that is mapped already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, key: slice) -> torch.Tensor:
        return self._tensor[key]


class PickledFile:
    """A file of torch.save, as safetensors' ``safe_open`` gives one. Its tensors are views of the mapped file."""

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The file stays mapped: it has many blocks."""

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> PickledSlice:
        if name not in self._tensors:
            raise CheckpointError(
                f"{name} is not in {self._path}, where the index puts it: fetch the model again"
            )
        return PickledSlice(self._tensors[name])
