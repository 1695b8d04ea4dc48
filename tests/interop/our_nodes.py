"""Starts our nodes as an operator does: a YAML file and ``kwaainet-bridge run``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from child_processes import Process
from stock_swarm import ADDRESS, LOOPBACK, START_SECONDS


def start_node(
    work: Path,
    name: str,
    *,
    model: Path | str | None = None,
    prefix: str | None = None,
    blocks: range | None = None,
    models: list[dict[str, Any]] | None = None,
    peers: list[str] | None = None,
    networks: dict[str, Any] | None = None,
    threads: int = 1,
    sections: dict[str, Any] | None = None,
    **model_options: Any,
) -> Process:
    """A node of its own identity in ``work``, listening on loopback. Returns at once: call ``wait_until_ready``.

    ``model_options`` are further keys of the ``model`` section; ``models`` is the section of that name for several.
    Without a model it is a bootstrap peer. It is in Petals alone, joined through ``peers``, unless ``networks`` say
    otherwise, as that section does. ``sections`` are further ones.
    """
    config: dict[str, Any] = {
        "identity": {"path": f"{name}.key", "kind": "ed25519"},
        "listen": [LOOPBACK],
        "networks": networks or {"petals": {"bootstrap": peers or []}},
        **(sections or {}),
    }
    if models is not None:
        config["models"] = models
    if model is not None:
        section = {"name": str(model), "dtype": "float32", "throughput": 1.0, "threads": threads}
        if prefix is not None:
            section["dht_prefix"] = prefix
        if blocks is not None:
            section["blocks"] = f"{blocks.start}:{blocks.stop}"
        config["model"] = section | model_options
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [Path(sys.executable).with_name("kwaainet-bridge"), "run", "-c", file]
    env = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return Process(name, argv, env=env, log=work / f"{name}.log")


def wait_until_ready(node: Process, *, serving: bool = True) -> str:
    """Wait until the node serves its blocks (or, without any, until it listens); returns its address."""
    address: str = node.wait_for(f"({ADDRESS})", START_SECONDS)[1]
    if serving:
        node.wait_for(r'"event": ?"serving"', START_SECONDS)
    return address
