"""What a node tells of its peers, sessions and blocks, each as one JSON object with a bounded number of rows.

docs/monitoring.md describes every key; a change of meaning is a new version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kwaainet_bridge import defaults
from kwaainet_bridge.node.admin.log_view import log_route
from kwaainet_bridge.node.admin.models import seconds, text
from kwaainet_bridge.node.admin.troubles import troubles
from kwaainet_bridge.node.readiness import BLOCKS
from kwaainet_bridge.node.state import NodeState

if TYPE_CHECKING:
    from kwaainet_bridge.engine import ServedSession
    from kwaainet_bridge.hivemind.client.snapshots import ClientSession
    from kwaainet_bridge.net import Libp2pHost
    from kwaainet_bridge.net.connection import Connection
    from kwaainet_bridge.node.model_state import ModelState
    from kwaainet_bridge.node.served import ServedBlocks

VIEWS_VERSION: Final = 1

_MAX_NAME: Final = 80  # what peers call themselves or their sessions
_STATES: Final = ("paused", "draining")  # phases of a model that its blocks are in, too


def view_routes(state: NodeState) -> list[Route]:
    """``/api/peers``, ``/api/sessions``, ``/api/blocks`` and ``/api/logs``."""

    def route(path: str, view: Callable[[NodeState], dict[str, Any]]) -> Route:
        async def answer(_request: Request) -> Response:
            return JSONResponse(view(state))

        return Route(path, answer)

    return [
        route("/api/peers", peers_view),
        route("/api/sessions", sessions_view),
        route("/api/blocks", blocks_view),
        log_route(state),
    ]


def _bounded(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shown = rows[: defaults.VIEW_ROWS]
    return {"schema": VIEWS_VERSION, "total": len(rows), "left_out": len(rows) - len(shown), name: shown}


# --- peers


def peers_view(state: NodeState) -> dict[str, Any]:
    """Connections, those of bootstrap peers first, then the oldest; and peers that were turned away or left alone."""
    host = state.host
    if host is None:
        return _bounded("peers", []) | {"refused": {}, "troubles": [], "troubles_left_out": 0}
    reached = {peer for watch in state.bootstrap.values() for peer in watch.reached}
    found = sorted(host.connections, key=lambda c: (c.remote not in reached, c.opened_at))
    rows = [
        _peer(connection, host, state, bootstrap=connection.remote in reached)
        for connection in found[: defaults.VIEW_ROWS]
    ]
    told = troubles(state, host)
    return {
        "schema": VIEWS_VERSION,
        "total": len(found),
        "left_out": len(found) - len(rows),
        "peers": rows,
        "refused": host.refused.counts,
        "troubles": told[: defaults.VIEW_ROWS],
        "troubles_left_out": len(told[defaults.VIEW_ROWS :]),
    }


def _peer(connection: Connection, host: Libp2pHost, state: NodeState, *, bootstrap: bool) -> dict[str, Any]:
    peer, said = connection.remote, host.description(connection.remote)
    address = connection.address
    round_trip = connection.round_trip_seconds
    return {
        "peer": str(peer),
        "address": None if address is None else address.transport,
        "inbound": not connection.initiator,
        "relay": None if connection.relay is None else str(connection.relay),
        "bootstrap": bootstrap,
        "networks": host.networks_of(peer),
        "agent": None if said is None else said.agent[:_MAX_NAME],
        "round_trip_ms": round(round_trip * 1e3, 3) if round_trip else None,
        "streams": connection.open_streams,
        "in_use": connection.in_use,
        "age_seconds": seconds(state.now - connection.opened_at),
    }


# --- sessions


def sessions_view(state: NodeState) -> dict[str, Any]:
    """Sessions that peers have here, and those in which this node generates text itself; the oldest first."""
    rows = [*_served_sessions(state), *_own_sessions(state)]
    return _bounded("sessions", sorted(rows, key=lambda row: -row["age_seconds"]))


def _sessions_of(served: ServedBlocks) -> Iterator[tuple[str, ServedSession]]:
    for network, server in served.by_network.items():
        yield from ((network, session) for session in server.sessions())


def _served_sessions(state: NodeState) -> Iterator[dict[str, Any]]:
    own = None if state.host is None else state.host.peer_id
    for model in state.models.values():
        if (served := model.served) is None:
            continue
        token_bytes = served.engine.cache_bytes_per_token
        for network, session in _sessions_of(served):
            held = session.session
            tokens = 0 if held is None else held.cache_tokens
            yield {
                "kind": "served",
                "networks": [network],
                "model": model.key,
                "peer": str(session.peer),
                "is_own_peer": session.peer == own,
                "name": None if session.name is None else session.name[:_MAX_NAME],
                "first": session.blocks.start,
                "end": session.blocks.stop,
                "state": _session_state(session.idle_since, waits=held is None),
                "tokens": 0 if held is None else held.position,
                "max_tokens": None if held is None else held.max_length,
                "batch_size": None if held is None else held.batch_size,
                "cache_tokens": tokens,
                "cache_bytes": tokens * len(session.blocks) * token_bytes,
                "promised_tokens": 0 if held is None else held.promised_tokens,
                "in_host_memory": held is not None and held.moved_out,
                "adapter": session.adapter,
                **_times(state, session.began, session.idle_since),
                "chain": [],
            }


def _own_sessions(state: NodeState) -> Iterator[dict[str, Any]]:
    swarms = {} if state.texts is None else state.texts.swarms()
    for model, swarm in swarms.items():
        for session in swarm.sessions():
            yield _own_session(state, model, session)


def _own_session(state: NodeState, model: str, session: ClientSession) -> dict[str, Any]:
    return {
        "kind": "own",
        "networks": sorted({hop.network for hop in session.chain}),
        "model": model,
        "peer": None,
        "is_own_peer": True,
        "name": None,
        "first": session.blocks.start,
        "end": session.blocks.stop,
        "state": _session_state(session.idle_since, waits=False),
        "tokens": session.position,
        "max_tokens": session.max_length,
        "batch_size": session.batch_size,
        "cache_tokens": 0,  # the servers' caches hold them; where one is this node, that is a session of its own
        "cache_bytes": 0,
        "promised_tokens": 0,
        "in_host_memory": False,
        "adapter": session.adapter,
        **_times(state, session.began, session.idle_since),
        "chain": [
            {"peer": str(hop.peer), "network": hop.network, "first": hop.blocks.start, "end": hop.blocks.stop}
            for hop in session.chain
        ],
    }


def _session_state(idle_since: float | None, *, waits: bool) -> str:
    if waits:
        return "waiting"
    return "stepping" if idle_since is None else "idle"


def _times(state: NodeState, began: float, idle_since: float | None) -> dict[str, float]:
    idle = 0.0 if idle_since is None else state.now - idle_since
    return {"age_seconds": seconds(state.now - began), "idle_seconds": seconds(idle)}


# --- blocks


def blocks_view(state: NodeState) -> dict[str, Any]:
    """Blocks that are served, and those on their way into memory; and of each model why there are none, if so."""
    rows = [
        row for model in state.models.values() for row in (*_served_blocks(model), *_coming_blocks(model))
    ]
    models = [
        {"name": model.key, "phase": model.phase.value, "reason": _reason(model)}
        for model in state.models.values()
    ]
    return _bounded("blocks", rows) | {"models": models}


def _reason(model: ModelState) -> str | None:
    return text(model.degraded[BLOCKS]) if BLOCKS in model.degraded else None


def _served_blocks(model: ModelState) -> Iterator[dict[str, Any]]:
    served = model.served
    if served is None:
        return
    engine = served.engine
    in_use = Counter(block for _, session in _sessions_of(served) for block in session.blocks)
    for block, held in engine.block_bytes.items():
        yield {
            "model": model.key,
            "block": block,
            "of": engine.model.num_blocks,
            "state": model.phase.value if model.phase.value in _STATES else "serving",
            "bytes": held,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "quantization": engine.quantization,
            "tensor_parallel": engine.tensor_parallel,
            "adapters": list(engine.adapters),
            "sessions": in_use[block],
        }


def _coming_blocks(model: ModelState) -> Iterator[dict[str, Any]]:
    progress = model.loading
    for index, block in enumerate(model.coming or ()):
        yield {
            "model": model.key,
            "block": block,
            "of": None,
            "state": "waiting" if progress is None else _coming_state(index, progress),
            "bytes": None,
            "dtype": None,
            "quantization": None,
            "tensor_parallel": None,
            "adapters": [],
            "sessions": 0,
        }


def _coming_state(index: int, progress: Any) -> str:
    if progress.fetched_bytes < progress.missing_bytes:
        return "fetching"
    if index < progress.blocks_done:
        return "loaded"
    return "loading" if index == progress.blocks_done else "waiting"
