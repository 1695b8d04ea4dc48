"""``kwaainet-bridge peers``, ``sessions`` and ``blocks``: what a running node has to do with, as tables."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.printing import counted, duration, print_table, printable
from kwaainet_bridge.cli.watching import View

SCHEMA: Final = 1
"""Of the views that are understood here."""


def _say(out: Console, text: str) -> None:
    out.print(printable(text), soft_wrap=True)


def _left_out(out: Console, count: int, what: str) -> None:
    if count:
        _say(out, f"{counted(count, what)} more")


# --- peers


def _draw_peers(told: dict[str, Any], out: Console) -> None:
    rows = [_peer_row(peer) for peer in told["peers"]]
    columns = ["peer", "network", "address", "way", "agent", "latency", "streams", "age"]
    if rows:
        print_table(out, columns, rows, fixed=["peer", "latency", "streams", "age"])
    else:
        _say(out, "no peer is connected")
    _left_out(out, told["left_out"], "peer")
    refused = {scope: count for scope, count in told["refused"].items() if count}
    if refused:
        out.print()
        _say(out, "refused so far: " + ", ".join(f"{scope} {count}" for scope, count in refused.items()))
    if told["troubles"]:
        out.print()
        troubles = [_trouble_row(one) for one in told["troubles"]]
        print_table(out, ["trouble", "peer", "where", "times", "for", "reason"], troubles, fixed=["trouble"])
    _left_out(out, told["troubles_left_out"], "trouble")


def _peer_row(peer: dict[str, Any]) -> list[str]:
    way = "in" if peer["inbound"] else "out"
    if peer["relay"] is not None:
        way += f" by relay {_short(peer['relay'])}"
    return [
        peer["peer"],
        ", ".join(peer["networks"]) + (" bootstrap" if peer["bootstrap"] else ""),
        peer["address"] or "",
        way,
        peer["agent"] or "",
        "" if peer["round_trip_ms"] is None else f"{peer['round_trip_ms']:.1f} ms",
        str(peer["streams"]),
        duration(peer["age_seconds"]),
    ]


def _trouble_row(one: dict[str, Any]) -> list[str]:
    left = one["seconds_left"]
    return [
        one["kind"],
        one["peer"],
        one["where"],
        str(one["times"]),
        "" if left is None else duration(left),
        one["reason"],
    ]


# --- sessions


def _draw_sessions(told: dict[str, Any], out: Console) -> None:
    rows = [_session_row(session) for session in told["sessions"]]
    columns = [
        "network",
        "model",
        "peer",
        "blocks",
        "state",
        "tokens",
        "of",
        "cache",
        "age",
        "idle",
        "adapter",
        "route",
    ]
    if rows:
        print_table(out, columns, rows, fixed=["network", "peer", "blocks", "state", "tokens"])
    else:
        _say(out, "no session is open")
    _left_out(out, told["left_out"], "session")


def _session_row(session: dict[str, Any]) -> list[str]:
    batch = session["batch_size"]
    held = (
        f"{session['cache_tokens']} ({session['cache_bytes'] / 1e6:.1f} MB)"
        if session["cache_tokens"]
        else ""
    )
    return [
        ", ".join(session["networks"]),
        session["model"],
        _whose(session),
        f"{session['first']}:{session['end']}",
        session["state"],
        f"{session['tokens']}" + (f" x {batch}" if batch not in (None, 1) else ""),
        "" if session["max_tokens"] is None else str(session["max_tokens"]),
        held + (" in host memory" if session["in_host_memory"] else ""),
        duration(session["age_seconds"]),
        duration(session["idle_seconds"]) if session["state"] == "idle" else "",
        session["adapter"] or "",
        " > ".join(f"{hop['first']}:{hop['end']} {_short(hop['peer'])}" for hop in session["chain"]),
    ]


def _whose(session: dict[str, Any]) -> str:
    if session["kind"] == "own":
        return "this node's text"
    return "this node" if session["is_own_peer"] else str(session["peer"])


# --- blocks


def _draw_blocks(told: dict[str, Any], out: Console) -> None:
    rows = [_block_row(block) for block in told["blocks"]]
    columns = ["model", "block", "state", "memory", "weights", "share", "adapters", "sessions"]
    if rows:
        print_table(out, columns, rows, fixed=["block", "state", "memory"])
    _left_out(out, told["left_out"], "block")
    there = {block["model"] for block in told["blocks"]}
    for model in told["models"]:
        reason = "" if model["reason"] is None else f": {model['reason']}"
        if model["name"] not in there or reason:
            _say(out, f"{model['name']}: {model['phase']}{reason}")
    if not told["models"]:
        _say(out, "this node serves no blocks")


def _block_row(block: dict[str, Any]) -> list[str]:
    weights = block["dtype"] or ""
    if block["quantization"] not in (None, "none"):
        weights = f"{block['quantization']}, {weights}"
    parts = block["tensor_parallel"]
    return [
        block["model"],
        f"{block['block']}" + ("" if block["of"] is None else f" of {block['of']}"),
        block["state"],
        "" if block["bytes"] is None else f"{block['bytes'] / defaults.MIB:.1f} MiB",
        weights,
        "" if parts in (None, 1) else f"1 of {parts}",
        ", ".join(block["adapters"]),
        str(block["sessions"]),
    ]


def _short(peer: str) -> str:
    return f"…{peer[-6:]}"


PEERS: Final = View("/api/peers", SCHEMA, _draw_peers)
SESSIONS: Final = View("/api/sessions", SCHEMA, _draw_sessions)
BLOCKS: Final = View("/api/blocks", SCHEMA, _draw_blocks)
