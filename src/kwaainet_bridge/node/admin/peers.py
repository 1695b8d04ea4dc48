"""The peers that a node is connected with, for people who look at the dashboard."""

from __future__ import annotations

from typing import Any

from kwaainet_bridge import defaults
from kwaainet_bridge.node.state import NodeState


def peers_of(state: NodeState) -> dict[str, Any]:
    """All connections, or ``defaults.DASHBOARD_PEERS`` of them, bootstrap peers first, then the oldest."""
    host = state.host
    if host is None:
        return {"total": 0, "peers": []}
    reached = {peer for watch in state.bootstrap.values() for peer in watch.reached}
    found = sorted(host.connections, key=lambda c: (c.remote not in reached, c.opened_at))
    rows = []
    for connection in found[: defaults.DASHBOARD_PEERS]:
        said = host.description(connection.remote)
        rows.append(
            {
                "peer": str(connection.remote),
                "bootstrap": connection.remote in reached,
                "network": host.network_of(connection.remote),
                "inbound": not connection.initiator,
                "relay": None if connection.relay is None else str(connection.relay),
                "address": connection.remote_host,
                "agent": "" if said is None else said.agent[:80],
                "since": round(state.unix_time(connection.opened_at), 3),
            }
        )
    return {"total": len(found), "peers": rows}
