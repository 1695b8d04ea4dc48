"""Which files a model's name stands for and where they are kept, what swarms call its blocks, how these are written."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kwaainet_bridge import defaults
from kwaainet_bridge.config import EMBEDDED_MODEL, ModelConfig
from kwaainet_bridge.engine import Storage
from kwaainet_bridge.hivemind.experts.records import check_prefix, default_prefix
from kwaainet_bridge.kwaai.records import network_prefix


def model_source(name: str) -> str:
    """The folder or hub repository of a model: ``austen`` is the one in the package."""
    if name == EMBEDDED_MODEL:
        return str(resources.files("kwaainet_bridge") / "models" / EMBEDDED_MODEL)
    return name


def storage_of(config: ModelConfig | None) -> Storage:
    """How the configuration has weights kept and read."""
    if config is None:
        return Storage()
    gib = config.cache_quota_gib
    quota = None if gib is None else int(gib * defaults.GIB)
    return Storage(config.cache_dir, quota, config.allow_pickled)


def swarm_prefix(name: str, family: str, given: str | None = None) -> str:
    """The DHT prefix: ``given``, or what Petals derives from a repository's or folder's name.

    Raises ConfigError for one that cannot be part of a block's name.
    """
    if given is not None:
        return check_prefix(given)
    folder = Path(name)
    return default_prefix(folder.resolve().name if folder.is_dir() else name, family)


def kwaainet_prefix(name: str, given: str | None = None) -> str:
    """The same in KwaaiNet: ``given``, or the last part of the repository's or folder's name.

    Raises ConfigError for one that cannot be part of a block's name.
    """
    if given is not None:
        return check_prefix(given)
    folder = Path(name)
    return check_prefix(network_prefix(folder.resolve().name if folder.is_dir() else name))


def shown(blocks: range) -> str:
    """Blocks as they are written: ``4:8``."""
    return f"{blocks.start}:{blocks.stop}"
