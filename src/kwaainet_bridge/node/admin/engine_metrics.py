"""What an engine tells Prometheus: how it computes, and what its sessions share and make room for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from kwaainet_bridge.node.admin.samples import counter, gauge, histogram

if TYPE_CHECKING:
    from kwaainet_bridge.engine import Engine, OffloadUse, PrefixUse


def engine_metrics(engines: Mapping[str, Engine]) -> Iterator[Metric]:
    """Of each engine, by its model's key."""
    model = ("model",)
    blocks = [((key,), len(engine.blocks)) for key, engine in engines.items()]
    yield gauge("blocks", "Blocks that are served.", blocks, model)
    counts = {(key,): engine.counts for key, engine in engines.items()}
    waited = [(of, count.queue_seconds) for of, count in counts.items()]
    yield histogram("queue_seconds", "How long a step waited for its batch.", waited, model)
    computed = [(of, count.batch_seconds) for of, count in counts.items()]
    yield histogram("batch_seconds", "How long a batch of steps was computed.", computed, model)
    sizes = [(of, count.batch_tokens) for of, count in counts.items()]
    yield histogram("batch_tokens", "Tokens of a batch of steps.", sizes, model)
    adapters = [((key,), len(engine.adapters)) for key, engine in engines.items()]
    yield gauge("adapters", "LoRA adapters that are loaded.", adapters, model)
    yield from _prefixes({(key,): engine.prefix_use for key, engine in engines.items()})
    yield from _offload({(key,): engine.offload_use for key, engine in engines.items()})


def _prefixes(uses: Mapping[tuple[str], PrefixUse | None]) -> Iterator[Metric]:
    there = {of: use for of, use in uses.items() if use is not None}
    yield counter(
        "prefix_tokens",
        "Tokens of whole pages that sessions may have in common, by whether they were found or computed.",
        [
            row
            for of, use in there.items()
            for row in (((*of, "found"), use.found), ((*of, "computed"), use.computed))
        ],
        ("model", "outcome"),
    )
    kept = [(of, use.kept_bytes) for of, use in there.items()]
    yield gauge("prefix_bytes", "Memory of beginnings that are kept.", kept, ("model",))


def _offload(uses: Mapping[tuple[str], OffloadUse | None]) -> Iterator[Metric]:
    model, there = ("model",), {of: use for of, use in uses.items() if use is not None}
    sessions = [(of, use.sessions) for of, use in there.items()]
    yield gauge("offloaded_sessions", "Idle sessions that are in the host's memory.", sessions, model)
    tokens = [(of, use.tokens) for of, use in there.items()]
    yield gauge("offloaded_tokens", "Their tokens.", tokens, model)
    held = [(of, use.num_bytes) for of, use in there.items()]
    yield gauge("offloaded_bytes", "What they take there.", held, model)
    ways = [
        ((*of, way), moved)
        for of, use in there.items()
        for way, moved in (("out", use.out), ("back", use.back))
    ]
    yield counter(
        "offload_moves",
        "Sessions that went to the host's memory, and that came back.",
        [(of, moved.sessions) for of, moved in ways],
        ("model", "direction"),
    )
    yield counter(
        "offload_moved_bytes",
        "Bytes that went with them.",
        [(of, moved.num_bytes) for of, moved in ways],
        ("model", "direction"),
    )
