"""What a Petals swarm's DHT holds about servers, and how its names are made.

Source: Petals main and 2.2.0.post1, ``data_structures.py``, ``utils/dht.py``, ``models/*/config.py``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError, RemoteError
from kwaainet_bridge.wire.peer_id import PeerId

MODEL_REGISTRY_KEY = "_petals.models"
"""DHT key whose subkeys are the prefixes of the swarm's models. Only monitors read it."""


class ServerState(enum.IntEnum):
    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """One server's record of one block.

    ``start_block`` and ``end_block`` describe the whole span [start, end), in each of its blocks' records.
    Rates are requests (tokens) per second; ``throughput`` is the one that routing and balancing compare.
    ``cache_tokens_left`` counts keys and values apart: twice the tokens that one block can still hold.
    ``next_pings`` maps peers that hold the following blocks to round-trip seconds.
    """

    state: ServerState
    throughput: float
    start_block: int | None = None
    end_block: int | None = None
    public_name: str | None = None
    version: str | None = None
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    adapters: tuple[str, ...] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None
    cache_tokens_left: int | None = None
    next_pings: Mapping[PeerId, float] = field(default_factory=dict)

    def to_value(self) -> tuple[int, float, dict[str, Any]]:
        """The record's value as stored, strictly typed: Petals' readers drop a record over an int rate."""
        fields = {
            "start_block": self.start_block,
            "end_block": self.end_block,
            "public_name": self.public_name,
            "version": self.version,
            "network_rps": _optional_float(self.network_rps),
            "forward_rps": _optional_float(self.forward_rps),
            "inference_rps": _optional_float(self.inference_rps),
            "adapters": tuple(self.adapters),
            "torch_dtype": self.torch_dtype,
            "quant_type": self.quant_type,
            "using_relay": self.using_relay,
            "cache_tokens_left": self.cache_tokens_left,
            "next_pings": {str(peer): float(rtt) for peer, rtt in self.next_pings.items()},
        }
        return int(self.state), float(self.throughput), fields

    @classmethod
    def from_value(cls, value: Any) -> ServerInfo:
        """Read a stored value. Raises RemoteError naming the field; unknown fields are ignored."""
        if not isinstance(value, tuple | list) or len(value) < 2:
            raise RemoteError("server record: expected (state, throughput, fields)")
        state, throughput = value[0], value[1]
        fields = value[2] if len(value) > 2 else {}
        if not isinstance(fields, dict):
            raise RemoteError("server record: the third item is not a map")
        if isinstance(state, bool) or state not in (0, 1, 2):
            raise RemoteError(f"server record: state {state!r:.60} is none of 0, 1, 2")
        rates = {k: _rate(fields.get(k), k) for k in ("network_rps", "forward_rps", "inference_rps")}
        return cls(
            state=ServerState(state),
            throughput=_rate(throughput, "throughput") or 0.0,
            start_block=_count(fields.get("start_block"), "start_block"),
            end_block=_count(fields.get("end_block"), "end_block"),
            public_name=_text(fields.get("public_name"), "public_name"),
            version=_text(fields.get("version"), "version"),
            **rates,
            adapters=_texts(fields.get("adapters"), "adapters"),
            torch_dtype=_text(fields.get("torch_dtype"), "torch_dtype"),
            quant_type=_text(fields.get("quant_type"), "quant_type"),
            using_relay=bool(fields["using_relay"]) if fields.get("using_relay") is not None else None,
            cache_tokens_left=_count(fields.get("cache_tokens_left"), "cache_tokens_left"),
            next_pings=_pings(fields.get("next_pings")),
        )


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What servers say of their model in the registry. ``repository`` is the address of a web page."""

    num_blocks: int
    repository: str | None = None

    @classmethod
    def from_value(cls, value: Any) -> ModelRecord:
        """Read a stored value. Raises RemoteError naming the field; unknown fields are ignored."""
        if not isinstance(value, dict):
            raise RemoteError("model record: not a map")
        num_blocks = _count(value.get("num_blocks"), "num_blocks", of="model record")
        # readers look up every block, so this number is work for them
        if num_blocks is None or not 1 <= num_blocks <= defaults.MAX_MODEL_BLOCKS:
            raise RemoteError(
                f"model record: num_blocks {num_blocks!r:.60} is not in 1..{defaults.MAX_MODEL_BLOCKS}"
            )
        return cls(num_blocks, _text(value.get("repository"), "repository", of="model record"))


def block_uid(prefix: str, block: int) -> str:
    """The name of one block, in requests and as DHT key."""
    return f"{prefix}.{block}"


def default_prefix(repository: str, family: str) -> str:
    """The DHT prefix that stock Petals derives from a hub name, per model family.

    Raises ConfigError for a name that yields no usable prefix.
    """
    name = repository.strip("/")
    if family == "mixtral":
        prefix = name
    elif family == "bloom":
        prefix = f"{name}-petals"
    else:
        prefix = name.rsplit("/", 1)[-1]
        if family == "llama" and not prefix.endswith("-hf"):
            prefix += "-hf"
    return check_prefix(prefix.replace(".", "-"))


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it can be part of a block uid. Raises ConfigError otherwise."""
    if not prefix or any(c in prefix for c in ". \t\n"):
        raise ConfigError(f"dht_prefix {prefix!r}: must be non-empty, without dots and spaces")
    return prefix


def _optional_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _rate(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RemoteError(f"server record: {name} {value!r:.60} is no finite rate")
    return float(value)


def _count(value: Any, name: str, *, of: str = "server record") -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RemoteError(f"{of}: {name} {value!r:.60} is no count")
    return value


def _text(value: Any, name: str, *, of: str = "server record") -> str | None:
    if value is not None and not isinstance(value, str):
        raise RemoteError(f"{of}: {name} is no text")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RemoteError(f"server record: {name} is no list")
    if not all(isinstance(v, str) for v in value):
        raise RemoteError(f"server record: {name} holds something other than text")
    return tuple(value)


def _pings(value: Any) -> dict[PeerId, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RemoteError("server record: next_pings is no map")
    pings: dict[PeerId, float] = {}
    for peer, rtt in value.items():
        # an unreachable neighbour is stored as infinity
        if isinstance(rtt, bool) or not isinstance(rtt, int | float) or not rtt >= 0:
            raise RemoteError(f"server record: next_pings of {peer!r:.60} is {rtt!r:.60}")
        pings[PeerId.parse(str(peer))] = float(rtt)
    return pings
