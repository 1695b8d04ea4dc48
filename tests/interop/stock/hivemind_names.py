"""Lets stock Petals 2.2.0.post1 import Hivemind 1.1.12.

Petals takes the names below from the package ``hivemind`` itself; since 1.1.12 they are found only in the modules
that define them. A line ``import hivemind_names`` in a ``.pth`` file of the environment runs this at each start of
its interpreter. A process that does not import Hivemind pays for one entry of ``sys.meta_path``, nothing more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DEFINED_IN = {
    "BatchTensorDescriptor": "hivemind.utils.tensor_descr",
    "MAX_DHT_TIME_DISCREPANCY_SECONDS": "hivemind.utils.timed_storage",
    "MSGPackSerializer": "hivemind.utils.serializer",
    "P2P": "hivemind.p2p",
    "P2PContext": "hivemind.p2p",
    "PeerID": "hivemind.p2p",
    "TensorDescriptor": "hivemind.utils.tensor_descr",
    "TimedStorage": "hivemind.utils.timed_storage",
    "anext": "hivemind.utils.asyncio",
    "deserialize_tensor_stream": "hivemind.compression.serialization",
    "deserialize_torch_tensor": "hivemind.compression.serialization",
    "get_dht_time": "hivemind.utils.timed_storage",
    "get_logger": "hivemind.utils.logging",
    "nested_compare": "hivemind.utils.nested",
    "nested_flatten": "hivemind.utils.nested",
    "nested_pack": "hivemind.utils.nested",
    "serialize_torch_tensor": "hivemind.compression.serialization",
}


def _find_name(name: str) -> Any:
    """The package's ``__getattr__`` (PEP 562): asked only for names that the package lacks."""
    if name not in DEFINED_IN:
        raise AttributeError(f"module 'hivemind' has no attribute {name!r}")
    return getattr(importlib.import_module(DEFINED_IN[name]), name)


class _HivemindFinder:
    """Finds ``hivemind`` once, by the finders behind this one, and adds ``__getattr__`` before its code runs."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        if name != "hivemind":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            module.__getattr__ = _find_name  # type: ignore[method-assign]
            run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _HivemindFinder)
