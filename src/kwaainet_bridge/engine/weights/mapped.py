"""Tensors of a safetensors file, as views of the mapped file.

safetensors' own ``safe_open`` maps whole files in a way that the system counts as memory in use: a machine cannot open
a file larger than its memory, though it needs a few tensors of it. Published files have up to 50 GB.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import KeysView
from pathlib import Path

import torch

from kwaainet_bridge.engine.weights.header import length_of, places_in
from kwaainet_bridge.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # the module mmap of Python 3.11 has no name for it


class MappedFile:
    """One file. It stays mapped as long as a tensor of it lives."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError for a file that cannot be read as its header says."""
        self._path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                length = length_of(file.read(8), size, path.name)
                self._places = places_in(file.read(length), size, path.name)
                # private and writable, which torch wants of a tensor's memory: nothing is written
                self._map = mmap.mmap(
                    file.fileno(),
                    size,
                    flags=mmap.MAP_PRIVATE | _NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except (CheckpointError, OSError) as e:
            raise CheckpointError(f"{path} is not a readable safetensors file ({e}): fetch it again") from e

    def keys(self) -> KeysView[str]:
        return self._places.keys()

    def shape(self, name: str) -> list[int]:
        return list(self._places[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError for one that torch computes nothing with."""
        told = self._places[name].dtype
        if told not in DTYPES:
            raise CheckpointError(
                f"{name} in {self._path} is stored as {told}: quantised checkpoints are not supported, "
                "use the original one"
            )
        return DTYPES[told]

    def tensor(self, name: str) -> torch.Tensor:
        """A view: what is written to it stays in memory."""
        place, dtype = self._places[name], self.dtype(name)
        if place.start == place.stop:
            return torch.empty(place.shape, dtype=dtype)
        count = (place.stop - place.start) // dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=place.start)
        return flat.view(place.shape)
