"""What a node tells of each of its models as JSON: part of the status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.phase import Announced

if TYPE_CHECKING:
    from kwaainet_bridge.engine import LoadProgress, OffloadUse, PrefixUse
    from kwaainet_bridge.node.served import BlockServer, ServedBlocks


def seconds(value: float) -> float:
    return round(value, 3)


def text(value: str) -> str:
    """A reason, which may hold what a peer said."""
    return value[: defaults.MAX_ERROR_CHARACTERS]


def model_as_json(model: ModelState, now: float) -> dict[str, Any]:
    served = model.served
    return {
        "name": model.key,
        "phase": {"name": model.phase.value, "seconds": seconds(now - model.since)},
        "degraded": {name: text(reason) for name, reason in model.degraded.items()},
        "loading": None if model.loading is None or served is not None else _loading(model.loading),
        "blocks": None if served is None else _blocks(served),
        "cache": None if served is None else _cache(served),
        "prefixes": None if served is None else _prefixes(served.engine.prefix_use),
        "offload": None if served is None else _offload(served.engine.offload_use),
        "networks": {network: _network(model, network, now) for network in model.announces},
    }


def use_of(servers: Iterable[BlockServer]) -> dict[str, Any]:
    """Sessions and counts of these together."""
    there = list(servers)
    return {
        "sessions": sum(server.open_sessions for server in there),
        "served": _served([server.counts for server in there]),
    }


def servers_in(models: Iterable[ModelState], network: str) -> list[BlockServer]:
    """What serves these models there, now."""
    found = (model.served.by_network.get(network) for model in models if model.served is not None)
    return [server for server in found if server is not None]


def _loading(progress: LoadProgress) -> dict[str, Any]:
    return {
        "blocks_done": progress.blocks_done,
        "blocks_total": progress.blocks_total,
        "fetched_bytes": progress.fetched_bytes,
        "missing_bytes": progress.missing_bytes,
    }


def _blocks(served: ServedBlocks) -> dict[str, Any]:
    engine = served.engine
    return {
        "source": engine.model.name,
        "first": engine.blocks.start,
        "end": engine.blocks.stop,
        "of": engine.model.num_blocks,
        "quantization": engine.quantization,
        "weights_bytes": engine.weights_bytes,
        "adapters": list(engine.adapters),
    }


def _cache(served: ServedBlocks) -> dict[str, Any]:
    total, left = served.cache_tokens
    return {"tokens_total": total, "tokens_left": left}


def _prefixes(use: PrefixUse | None) -> dict[str, Any] | None:
    if use is None:
        return None
    return {"found_tokens": use.found, "computed_tokens": use.computed, "kept_bytes": use.kept_bytes}


def _offload(use: OffloadUse | None) -> dict[str, Any] | None:
    if use is None:
        return None
    return {
        "sessions": use.sessions,
        "tokens": use.tokens,
        "bytes": use.num_bytes,
        "moves": {"out": use.out.sessions, "back": use.back.sessions},
        "moved_bytes": {"out": use.out.num_bytes, "back": use.back.num_bytes},
    }


def _network(model: ModelState, network: str, now: float) -> dict[str, Any]:
    known = model.announced.get(network)
    return {
        "prefix": model.prefixes.get(network),
        "announced": None if known is None else _announced(known, now),
        **use_of(servers_in([model], network)),
    }


def _announced(known: Announced, now: float) -> dict[str, Any]:
    report = known.last
    return {
        "state": report.state.name,
        "age_seconds": seconds(now - known.at),
        "lifetime_seconds": report.lifetime,
        "records": report.records,
        "acknowledged": report.acknowledged,
        "by_others": report.by_others,
        "peers": {
            str(peer): answer if isinstance(answer, int) else text(answer)
            for peer, answer in report.peers.items()
        },
    }


def _served(all_counts: list[ServingCounts]) -> dict[str, Any]:
    phases = dict.fromkeys(ServingCounts().step_seconds, 0.0)
    received: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for counts in all_counts:
        received.update(counts.received_bytes)
        sent.update(counts.sent_bytes)
        for phase, seen in counts.step_seconds.items():
            phases[phase] += seen.sum
    return {
        "steps": sum(counts.steps for counts in all_counts),
        "step_tokens": sum(counts.step_tokens for counts in all_counts),
        "passes": sum(counts.passes for counts in all_counts),
        "pass_tokens": sum(counts.pass_tokens for counts in all_counts),
        "refused": sum(counts.refused for counts in all_counts),
        "timed_steps": sum(counts.step_seconds["engine"].count for counts in all_counts),
        "step_seconds": {phase: round(spent, 6) for phase, spent in phases.items()},
        "received_bytes": dict(received),
        "sent_bytes": dict(sent),
    }
