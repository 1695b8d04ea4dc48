"""What a node tells of itself as JSON. docs/monitoring.md describes every key; a change of meaning is a new version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.hivemind.averaging import Outcome, Status
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.node.admin.problems import problems
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import Announced, NodeState

if TYPE_CHECKING:
    from kwaainet_bridge.engine import LoadProgress

SCHEMA_VERSION: Final = 1


def status_of(state: NodeState) -> dict[str, Any]:
    """The whole status: text, numbers, booleans, lists and objects, as JSON has them."""
    judged = conditions(state)
    verdict, evidence = state.reachability
    return {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "peer_id": None if state.host is None else str(state.host.peer_id),
        "addresses": [] if state.host is None else list(state.host.addresses()),
        "uptime_seconds": _seconds(state.now - state.began),
        "phase": {"name": state.phase.value, "seconds": _seconds(state.now - state.since)},
        "ready": is_ready(judged),
        "conditions": [{"name": c.name, "met": c.met, "reason": _text(c.reason)} for c in judged],
        "degraded": {name: _text(reason) for name, reason in state.degraded.items()},
        "problems": [
            {"name": p.name, "reason": _text(p.reason), "remedy": p.remedy} for p in problems(state)
        ],
        "loading": _loading(state.loading),
        "reachability": {"verdict": verdict.value, "evidence": evidence},
        "networks": {name: _network(state, name) for name in state.bootstrap},
        "blocks": _blocks(state),
        "cache": _cache(state),
        "host": None if state.host is None else host_counts(state.host),
        "averaging": {name: _run(status()) for name, status in state.averaging.items()},
        "event_loop": {
            "lag_p50_seconds": state.lag.quantile(0.5),
            "lag_p99_seconds": state.lag.quantile(0.99),
            "lag_max_seconds": round(state.lag.largest, 6),
        },
    }


def _loading(progress: LoadProgress | None) -> dict[str, Any] | None:
    if progress is None:
        return None
    return {
        "blocks_done": progress.blocks_done,
        "blocks_total": progress.blocks_total,
        "fetched_bytes": progress.fetched_bytes,
        "missing_bytes": progress.missing_bytes,
    }


def _seconds(value: float) -> float:
    return round(value, 3)


def _text(value: str) -> str:
    """A reason, which may hold what a peer said."""
    return value[: defaults.MAX_ERROR_CHARACTERS]


def _network(state: NodeState, name: str) -> dict[str, Any]:
    watch, known, served = state.bootstrap[name], state.announced.get(name), state.served
    server = None if served is None else served.by_network.get(name)
    return {
        "bootstrap": {"total": watch.total, "reached": sorted(str(peer) for peer in watch.reached)},
        "announced": None if known is None else _announced(known, state.now),
        "prefix": None if served is None else served.prefixes.get(name),
        "sessions": 0 if server is None else server.open_sessions,
        "served": _served(ServingCounts() if server is None else server.counts),
    }


def _announced(known: Announced, now: float) -> dict[str, Any]:
    report = known.last
    return {
        "state": report.state.name,
        "age_seconds": _seconds(now - known.at),
        "lifetime_seconds": report.lifetime,
        "records": report.records,
        "acknowledged": report.acknowledged,
        "by_others": report.by_others,
        "peers": {
            str(peer): answer if isinstance(answer, int) else _text(answer)
            for peer, answer in report.peers.items()
        },
    }


def _served(counts: ServingCounts) -> dict[str, Any]:
    return {
        "steps": counts.steps,
        "step_tokens": counts.step_tokens,
        "passes": counts.passes,
        "pass_tokens": counts.pass_tokens,
        "refused": counts.refused,
        "timed_steps": counts.step_seconds["engine"].count,
        "step_seconds": {phase: round(seen.sum, 6) for phase, seen in counts.step_seconds.items()},
        "received_bytes": dict(counts.received_bytes),
        "sent_bytes": dict(counts.sent_bytes),
    }


def _blocks(state: NodeState) -> dict[str, Any] | None:
    if state.served is None:
        return None
    engine = state.served.engine
    return {
        "model": engine.model.name,
        "first": engine.blocks.start,
        "end": engine.blocks.stop,
        "of": engine.model.num_blocks,
    }


def _cache(state: NodeState) -> dict[str, Any] | None:
    if state.served is None:
        return None
    total, left = state.served.cache_tokens
    return {"tokens_total": total, "tokens_left": left}


def host_counts(host: Libp2pHost) -> dict[str, Any]:
    """Connections and streams of a host, and what it turned away."""
    connections = list(host.connections)
    inbound = sum(not c.initiator for c in connections)
    return {
        "connections": {
            "inbound": inbound,
            "outbound": len(connections) - inbound,
            "relayed": sum(c.relay is not None for c in connections),
            "handshakes": host.connections.count - len(connections),
            "limit": host.connections.limit,
        },
        "streams": {"open": host.inbound.running, "limit": host.inbound.limit},
        "refused": asdict(host.refused),
    }


def _run(status: Status) -> dict[str, Any]:
    last, counts = status.last, status.counts
    return {
        "phase": None if status.phase is None else status.phase.value,
        "group": _peers(status.members),
        "rounds": status.rounds,
        "steps": {outcome.value: counts.steps[outcome] for outcome in Outcome},
        "sent_bytes": status.sent_bytes,
        "received_bytes": status.received_bytes,
        "last_group": [] if last is None else _peers(last.gathered),
        "last_missing_elements": 0 if last is None else last.missing_elements,
        "banned": [
            {
                "peer": str(ban.peer),
                "kind": ban.kind.value,
                "reason": _text(ban.reason),
                "at": _seconds(ban.at),
            }
            for ban in counts.bans
        ],
    }


def _peers(peers: Sequence[Any] | dict[Any, Any]) -> list[str]:
    return [str(peer) for peer in peers]
