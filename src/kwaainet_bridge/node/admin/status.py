"""What a node tells of itself as JSON. docs/monitoring.md describes every key; a change of meaning is a new version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kwaainet_bridge import __version__
from kwaainet_bridge.hivemind.averaging import Outcome, Status
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.node.admin.models import model_as_json, seconds, servers_in, text, use_of
from kwaainet_bridge.node.admin.problems import problems
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState

SCHEMA_VERSION: Final = 2


def status_of(state: NodeState) -> dict[str, Any]:
    """The whole status: text, numbers, booleans, lists and objects, as JSON has them."""
    judged = conditions(state)
    verdict, evidence = state.reachability
    return {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "peer_id": None if state.host is None else str(state.host.peer_id),
        "addresses": [] if state.host is None else list(state.host.addresses()),
        "uptime_seconds": seconds(state.now - state.began),
        "phase": {"name": state.phase.value, "seconds": seconds(state.now - state.since)},
        "paused": state.pausing.reason,
        "ready": is_ready(judged),
        "conditions": [
            {"name": c.name, "model": c.model, "met": c.met, "reason": text(c.reason)} for c in judged
        ],
        "degraded": {name: text(reason) for name, reason in state.degraded.items()},
        "problems": [
            {"name": p.name, "model": p.model, "reason": text(p.reason), "remedy": p.remedy}
            for p in problems(state)
        ],
        "reachability": {"verdict": verdict.value, "evidence": evidence},
        "networks": {name: _network(state, name) for name in state.bootstrap},
        "models": [model_as_json(model, state.now) for model in state.models.values()],
        "host": None if state.host is None else host_counts(state.host),
        "averaging": {name: _run(status()) for name, status in state.averaging.items()},
        "event_loop": {
            "lag_p50_seconds": state.lag.quantile(0.5),
            "lag_p99_seconds": state.lag.quantile(0.99),
            "lag_max_seconds": round(state.lag.largest, 6),
        },
    }


def _network(state: NodeState, name: str) -> dict[str, Any]:
    watch = state.bootstrap[name]
    return {
        "bootstrap": {"total": watch.total, "reached": sorted(str(peer) for peer in watch.reached)},
        **use_of(servers_in(state.models.values(), name)),
    }


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
        "refused": host.refused.counts,
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
                "reason": text(ban.reason),
                "at": seconds(ban.at),
            }
            for ban in counts.bans
        ],
    }


def _peers(peers: Sequence[Any] | dict[Any, Any]) -> list[str]:
    return [str(peer) for peer in peers]
