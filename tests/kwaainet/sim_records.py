"""What a KwaaiNet node writes into the DHT, and the rules by which its readers take or leave a record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sim_dht import unpack
from sim_envelope import BrokenRules

JOINING, READY, OFFLINE = 0, 2, -1
MODELS_KEY, NODES_KEY = "_petals.models", "_kwaai.inference.nodes"
OLDEST_VERSION = (0, 3, 15)
PERIOD_SECONDS = 120.0  # between announcements
LIFE_SECONDS = 360.0  # of each record

_VERSION = re.compile(r"(?:kwaai-)?(\d+)\.(\d+)\.(\d+)", re.ASCII)


class Unusable(Exception):
    """A record that readers pass over; the text says why."""


def prefix_of(repository: str) -> str:
    """The DHT prefix: the repository's base name with dots turned into dashes."""
    return repository.rpartition("/")[2].replace(".", "-")


def block_key(prefix: str, block: int) -> str:
    return f"{prefix}.{block}"


def server_value(
    *,
    state: int,
    throughput: float,
    blocks: range,
    peer_id: str,
    public_name: str,
    version: str,
    cache_tokens_left: int,
) -> tuple[int, float, dict[str, Any]]:
    """The value of a node under each block and in the list of nodes, with its fields in their order."""
    return state, throughput, {
        "start_block": blocks.start,
        "end_block": blocks.stop,
        "public_name": public_name,
        "version": version,
        "torch_dtype": "float16",
        "using_relay": False,
        "cache_tokens_left": cache_tokens_left,
        "adapters": [],
        "next_pings": {},
        "peer_id": peer_id,
        "lease_v1": True,
    }  # fmt: skip


@dataclass(frozen=True)
class ServerRecord:
    """A node as a reader sees it. ``blocks`` ends before ``end_block``."""

    peer_id: str
    blocks: range
    throughput: float
    version: str
    leases: bool


def read_server(subkey: Any, value: bytes) -> ServerRecord:
    """Apply the readers' rules: ready, a version of [kwaai-]0.3.15 or later, and blocks. Raises Unusable."""
    try:
        record = unpack(value)
    except BrokenRules as e:
        raise Unusable(str(e)) from e
    if not isinstance(record, tuple) or len(record) < 3 or not isinstance(record[2], dict):
        raise Unusable(f"not [state, throughput, fields] in extension 64: {record!r:.80}")
    state, throughput, fields = record[:3]
    if type(state) is not int or state != READY:
        raise Unusable(f"state {state}")
    version = fields.get("version")
    parsed = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if parsed is None:
        raise Unusable(f"version {version!r}")
    if tuple(map(int, parsed.groups())) < OLDEST_VERSION:
        raise Unusable(f"version {version} is older than 0.3.15")
    peer_id = fields.get("peer_id") or subkey
    if not isinstance(peer_id, str):
        raise Unusable("no peer id")
    start, end = fields.get("start_block"), fields.get("end_block")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise Unusable(f"blocks {start!r} to {end!r}")
    if not isinstance(throughput, (int, float)) or isinstance(throughput, bool):
        raise Unusable(f"throughput {throughput!r}")
    return ServerRecord(
        peer_id, range(start, end), float(throughput), version, fields.get("lease_v1") is True
    )
