"""Models' files: configuration, index, and the tensors of safetensors files, read one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kwaainet_bridge.engine.weights.cache import Fetched, WeightCache
from kwaainet_bridge.engine.weights.mapped import MappedFile
from kwaainet_bridge.engine.weights.pickled import PickledFile
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

Download = Callable[[str, str, str | None], Path | None]
"""(repository, file name, revision) -> where it lies now, or None if the repository has no such file."""

SAFETENSORS = ".safetensors"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
MISSING = "the checkpoint is incomplete, or its family stores weights in a layout this version cannot read"
COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_download(repository: str, file: str, revision: str | None) -> Path | None:
    """Fetch one file of a Hugging Face repository into the hub's cache, unless it is there. Blocks."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    if try_to_load_from_cache(repository, file, revision=revision) is _CACHED_NO_EXIST:
        return None  # the hub has said so of this commit, which is all that one knows without a connection
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:
        raise ModelUnreachable(
            f"{repository}/{file} is not in the local cache and the hub cannot be reached: "
            "check the connection, or give a local model folder"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot fetch {repository}/{file}: {error}. Check the repository's name, the revision and, "
            "for a gated model, that HF_TOKEN is set"
        ) from error


class Checkpoint:
    """One model's files. Opening reads its configuration and index; weights are fetched when they are needed.

    All methods block on the disk, or for a hub repository on the network: call them from a thread.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        download: Download = hub_download,
        weights: WeightCache | None = None,
        allow_pickled: bool = False,
    ) -> None:
        """Raise CheckpointError if ``model`` is neither a folder nor a repository that can be served from.

        ``download`` fetches whole files; with ``weights`` only the needed tensors of safetensors files are fetched,
        into that. ``allow_pickled``: read pickled weights, too, if there are no others.
        """
        self.name = model
        self._download = download
        self._weights: WeightCache | None = None
        self._allow_pickled = allow_pickled
        self._pickled: dict[str, PickledFile] = {}
        self._revision = revision
        if Path(model).is_dir():
            self.repository = None
            self.folder = Path(model)
        elif REPOSITORY.fullmatch(model):
            self.repository = model
            config = download(model, "config.json", revision)
            if config is None:
                raise CheckpointError(
                    f"{model} has no config.json: it is no repository of a transformers model"
                )
            self.folder = config.parent
            if COMMIT.fullmatch(self.folder.name):
                self._revision = self.folder.name  # all files of one commit, though the branch may move
                self._weights = weights
        else:
            raise CheckpointError(f"{model} is neither a model folder nor a repository id like org/name")
        self.config = self.json("config.json")
        self._file_of = self._index()

    def prefix_of(self, *tensors: str) -> str:
        """What stands before ``tensors`` in this checkpoint: "model." for "layers.0.mlp.up_proj.weight", say.

        That of the first that is there once: a model that also sees may have such names in another tower as well.
        Raises CheckpointError if there is none.
        """
        for tensor in tensors:
            found = [name for name in self._file_of if name == tensor or name.endswith("." + tensor)]
            if len(found) == 1:
                return found[0].removesuffix(tensor)
        what = "has no tensor" if not found else f"has {len(found)} tensors"
        raise CheckpointError(f"{self.name} {what} named …{tensor}: {MISSING}")

    def __contains__(self, tensor: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return tensor in self._file_of

    def files_of(self, tensors: Iterable[str]) -> Sequence[str]:
        """The names of the files that hold ``tensors``, each once, in order of first use."""
        return list(dict.fromkeys(self._locate(name) for name in tensors))

    def fetch_tensors(self, tensors: Iterable[str], told: Fetched = lambda _fetched, _missing: None) -> None:
        """Have the files, or the parts of them, that hold ``tensors``. ``told`` hears of what is fetched."""
        by_file: dict[str, list[str]] = {}
        for name in tensors:
            by_file.setdefault(self._locate(name), []).append(name)
        if self._weights is not None and self._revision is not None and self.repository is not None:
            ranged = {file: names for file, names in by_file.items() if file.endswith(SAFETENSORS)}
            self._weights.fetch(self.repository, self._revision, ranged, told)
        for file in by_file:
            self.fetch(file)

    def fetch(self, file: str) -> Path:
        """Where ``file`` lies, fetched first if it has to be. CheckpointError if the model has no such
        file."""
        path = self.find(file)
        if path is None:
            where = self.repository or self.folder
            raise CheckpointError(f"{where} has no {file}: the model is incomplete, fetch it again")
        return path

    def dtype_of(self, tensor: str) -> torch.dtype:
        """The dtype in which ``tensor`` is stored."""
        return self._holding(self._locate(tensor), tensor).dtype(tensor)

    def read(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for each name in ``shapes``, file by file, nothing else of the files.

        The tensors are views of the mapped files: copy what must outlive them. CheckpointError names a
        tensor that is missing, has another shape, or is not of a plain floating-point dtype.
        """
        self.fetch_tensors(shapes)  # holes of a file would be read as zeros
        for file_name in self.files_of(shapes):
            wanted = [name for name in shapes if self._locate(name) == file_name]
            file = self._holding(file_name, *wanted)
            for name in wanted:
                shape, dtype = file.shape(name), file.dtype(name)
                if shape != list(shapes[name]):
                    raise CheckpointError(
                        f"{name} in {self.folder / file_name} has shape {shape}, the configuration says "
                        f"{list(shapes[name])}: config.json and weights are of different models"
                    )
                if not dtype.is_floating_point or dtype.itemsize < 2:
                    raise CheckpointError(
                        f"{name} in {self.folder / file_name} is stored as {dtype}: "
                        "quantised checkpoints are not supported, use the original one"
                    )
                yield name, file.tensor(name)

    def _locate(self, tensor: str) -> str:
        try:
            return self._file_of[tensor]
        except KeyError:
            raise CheckpointError(f"{self.name} has no tensor {tensor}: {MISSING}") from None

    def _index(self) -> dict[str, str]:
        if self.find(INDEX) is not None:
            return self._weight_map(INDEX)
        if self.find(SINGLE) is not None:
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        for pickled in PICKLED:
            if self.find(pickled) is not None:
                return self._pickled_index(pickled)
        raise CheckpointError(f"{self.name} has neither {SINGLE} nor {INDEX}: not a complete model folder")

    def _pickled_index(self, file: str) -> dict[str, str]:
        if not self._allow_pickled:
            raise CheckpointError(
                f"{self.name} has only pickled weights ({file}), which can run code when read: "
                "convert the model to safetensors (save_pretrained of a recent transformers does), or set "
                "model.allow_pickled, which reads tensors alone and refuses everything else"
            )
        if not file.endswith(".json"):
            return dict.fromkeys(self._open(file).keys(), file)
        return self._weight_map(file)

    def _weight_map(self, index: str) -> dict[str, str]:
        weight_map = self.json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        ):
            raise CheckpointError(f"{self.folder / index} has no usable weight_map: fetch the model again")
        return weight_map

    def find(self, file: str) -> Path | None:
        """Where ``file`` lies, fetched first if it has to be; None if the model has no such file."""
        path = self.folder / file
        if path.is_file():
            return path
        if self.repository is None:
            return None
        if self._weights is not None and self._revision is not None and file.endswith(SAFETENSORS):
            return self._weights.path(self.repository, file, self._revision)
        return self._download(self.repository, file, self._revision)

    def json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file of the model. CheckpointError if there is none or it is no object."""
        path = self.fetch(file)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds no JSON object")
        return value

    def _open(self, file: str) -> MappedFile | PickledFile:
        path = self.fetch(file)
        if file.endswith(SAFETENSORS):
            return MappedFile(path)
        if file not in self._pickled:  # to find where its tensors lie takes long
            self._pickled[file] = PickledFile(path)
        return self._pickled[file]

    def _holding(self, file: str, *tensors: str) -> MappedFile | PickledFile:
        opened = self._open(file)
        for tensor in tensors:
            if tensor not in opened.keys():  # noqa: SIM118  # no mapping
                raise CheckpointError(
                    f"{tensor} is not in {self.folder / file}, where the index puts it: fetch the model again"
                )
        return opened
