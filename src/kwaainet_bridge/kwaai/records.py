"""What a KwaaiNet swarm's DHT holds about its nodes, and by which rules they read it.

The records look like those of Petals servers and differ in names, states and versions.
Source: KwaaiNet v0.6.2, ``kwaai-cli/src/hivemind.rs`` and the announcements it makes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.peer_id import PeerId

MODEL_REGISTRY_KEY: Final = "_petals.models"
NODES_KEY: Final = "_kwaai.inference.nodes"
"""The key under which every node that serves a model has an entry."""

READY: Final = 2
JOINING: Final = 1
OFFLINE: Final = 0
"""States as we write them. KwaaiNet's own are 0 joining, 2 ready and -1 offline; its readers look for 2 only, and
readers of Petals records refuse -1, so none of ours is misread by either."""

COMPATIBLE_VERSION: Final = "kwaai-0.6.2"
"""The release whose protocols this node speaks. Readers leave out nodes whose version is no ``[kwaai-]X.Y.Z``."""

LEAST_VERSION: Final = "0.3.15"
"""The oldest release whose nodes readers take."""

_LEAST: Final = tuple(map(int, LEAST_VERSION.split(".")))
_VERSION: Final = re.compile(r"(?:kwaai-)?(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node's record. Blocks are [start, end); ``throughput`` is in tokens per second."""

    peer: PeerId
    state: int
    throughput: float
    start_block: int
    end_block: int
    public_name: str = ""
    version: str = COMPATIBLE_VERSION
    torch_dtype: str = "float32"
    using_relay: bool = False
    cache_tokens_left: int = 0
    leases: bool = True

    def to_value(self) -> tuple[int, float, dict[str, Any]]:
        """The record's value as stored, its fields in the order of KwaaiNet's nodes."""
        fields = {
            "start_block": self.start_block,
            "end_block": self.end_block,
            "public_name": self.public_name,
            "version": self.version,
            "torch_dtype": self.torch_dtype,
            "using_relay": self.using_relay,
            "cache_tokens_left": self.cache_tokens_left,
            "adapters": (),
            "next_pings": {},
            "peer_id": str(self.peer),
            "lease_v1": self.leases,
        }
        return self.state, float(self.throughput), fields

    @classmethod
    def from_value(cls, subkey: Any, value: Any) -> NodeInfo:
        """Read a stored value. Unknown and missing fields do no harm. Raises RemoteError naming the field.

        The peer is the one that the record names, else the subkey.
        """
        if not isinstance(value, tuple | list) or len(value) < 3 or not isinstance(value[2], dict):
            raise RemoteError("node record: expected (state, throughput, fields)")
        state, throughput, fields = value[0], value[1], value[2]
        if isinstance(state, bool) or not isinstance(state, int):
            raise RemoteError(f"node record: state {state!r:.60} is no number")
        if isinstance(throughput, bool) or not isinstance(throughput, int | float):
            raise RemoteError(f"node record: throughput {throughput!r:.60} is no number")
        start, end = (_block(fields.get(name), name) for name in ("start_block", "end_block"))
        name = fields.get("peer_id") or subkey
        if not isinstance(name, str):
            raise RemoteError("node record: neither peer_id nor the subkey is a peer id")
        left = fields.get("cache_tokens_left")
        return cls(
            peer=PeerId.parse(name),
            state=state,
            throughput=float(throughput) if 0 <= throughput < math.inf else 0.0,
            start_block=start,
            end_block=end,
            public_name=_text(fields.get("public_name")),
            version=_text(fields.get("version")),
            torch_dtype=_text(fields.get("torch_dtype")),
            using_relay=fields.get("using_relay") is True,
            cache_tokens_left=left if isinstance(left, int) and left > 0 else 0,
            leases=fields.get("lease_v1") is True,
        )

    @property
    def usable(self) -> bool:
        """Whether KwaaiNet's clients would use it: ready, of a version that they know, and with blocks."""
        return self.state == READY and is_known(self.version) and self.start_block < self.end_block


def is_known(version: str) -> bool:
    """Whether readers take nodes of this version: ``0.3.15`` or later, with or without ``kwaai-`` before it."""
    match = _VERSION.fullmatch(version)
    return match is not None and tuple(map(int, match.groups())) >= _LEAST


def network_prefix(repository: str) -> str:
    """What KwaaiNet calls a model's blocks: the last part of the repository's name, dots as dashes."""
    return repository.strip("/").rsplit("/", 1)[-1].replace(".", "-")


def _block(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RemoteError(f"node record: {name} {value!r:.60} is no block")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
