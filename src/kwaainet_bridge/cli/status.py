"""``kwaainet-bridge status``: what a running node tells of itself, on one screen."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.printing import counted, duration, print_table, printable
from kwaainet_bridge.cli.watching import View


def _draw(status: dict[str, Any], out: Console) -> None:
    """Print a status for people. KeyError and its kin for an object that is none."""
    phase, verdict = status["phase"], status["reachability"]
    ready = "ready" if status["ready"] else "NOT READY"
    _line(
        out,
        "node",
        f"{status['peer_id']} kwaainet-bridge {status['version']}, up for {duration(status['uptime_seconds'])}",
    )
    _line(out, "phase", f"{phase['name']} for {duration(phase['seconds'])}, {ready}")
    for address in status["addresses"]:
        _line(out, "address", address)
    _line(out, "reachable", f"{verdict['verdict']}: {verdict['evidence']}")
    _draw_models(status["models"], out)
    _draw_host(status, out)
    unmet = {(c["name"], c["model"]): c["reason"] for c in status["conditions"] if not c["met"]}
    for model in (None, *status["models"]):
        name, degraded = (None, status["degraded"]) if model is None else (model["name"], model["degraded"])
        unmet |= {(which, name): why for which, why in degraded.items() if (which, name) not in unmet}
    if unmet:
        several = len(status["models"]) > 1
        rows = [[f"{name} of {of}" if several and of else name, why] for (name, of), why in unmet.items()]
        out.print()
        print_table(out, ["not met", "reason"], rows, fixed=["not met"])
    _draw_networks(status, out)
    _draw_averaging(status["averaging"], out)


def _line(out: Console, label: str, text: str) -> None:
    out.print(f"{label:<12}{printable(text)}", soft_wrap=True)


def _draw_models(models: list[dict[str, Any]], out: Console) -> None:
    if not models:
        _line(out, "blocks", "none")
    for model in models:
        blocks, cache = model["blocks"], model["cache"]
        if blocks is None:
            _line(out, "blocks", f"{model['name']}: {model['phase']['name']}{_loaded(model['loading'])}")
            continue
        total, left = cache["tokens_total"], cache["tokens_left"]
        span = f"{blocks['first']}:{blocks['end']} of {blocks['of']}"
        phase = "" if model["phase"]["name"] == "serving" else f", {model['phase']['name']}"
        _line(out, "blocks", f"{span}, {model['name']}{phase}; {total - left} of {total} cache tokens in use")
        bits = "" if blocks["quantization"] == "none" else f" as {blocks['quantization']}"
        _line(out, "weights", f"{blocks['weights_bytes'] / defaults.MIB:.0f} MiB{bits}")
        if blocks["adapters"]:
            _line(out, "adapters", ", ".join(blocks["adapters"]))


def _loaded(loading: dict[str, Any] | None) -> str:
    return "" if loading is None else f", {loading['blocks_done']} of {loading['blocks_total']} blocks"


def _draw_host(status: dict[str, Any], out: Console) -> None:
    host, lag = status["host"], status["event_loop"]
    if host is not None:
        c, streams = host["connections"], host["streams"]
        _line(
            out,
            "connections",
            f"{c['inbound']} in, {c['outbound']} out, {c['relayed']} of them relayed; limit {c['limit']}; "
            f"{counted(streams['open'], 'stream')} of peers",
        )
        refused = {scope: count for scope, count in host["refused"].items() if count}
        if refused:
            _line(out, "refused", ", ".join(f"{scope} {count}" for scope, count in refused.items()))
    _line(
        out,
        "event loop",
        f"late by {_ms(lag['lag_p50_seconds'])} (half), {_ms(lag['lag_p99_seconds'])} (99 %), "
        f"{_ms(lag['lag_max_seconds'])} at most",
    )


def _draw_networks(status: dict[str, Any], out: Console) -> None:
    rows = []
    for name, network in status["networks"].items():
        bootstrap = f"{len(network['bootstrap']['reached'])} of {network['bootstrap']['total']}"
        used = [m["networks"][name] for m in status["models"] if name in m["networks"]]
        rows += [[name, bootstrap, *_row(use)] for use in used or [network]]
    if rows:
        out.print()
        columns = [
            "network",
            "bootstrap",
            "prefix",
            "announced",
            "sessions",
            "steps",
            "tokens",
            "received",
            "sent",
        ]
        print_table(out, columns, rows, fixed=["network", "bootstrap"])


def _row(use: dict[str, Any]) -> list[str]:
    """Of one model in one network, or of a network without any."""
    known, served = use.get("announced"), use["served"]
    told = ""
    if known is not None:
        age = duration(known["age_seconds"])
        told = f"{known['state']}, {known['by_others']} of {known['records']} kept by others, {age} ago"
    return [
        use.get("prefix") or "",
        told,
        str(use["sessions"]),
        str(served["steps"]),
        str(served["step_tokens"] + served["pass_tokens"]),
        _mb(sum(served["received_bytes"].values())),
        _mb(sum(served["sent_bytes"].values())),
    ]


def _draw_averaging(runs: dict[str, Any], out: Console) -> None:
    rows, bans = [], []
    for name, run in runs.items():
        rows.append(
            [
                name,
                run["phase"] or "idle",
                str(len(run["group"])),
                str(run["rounds"]),
                _mb(run["received_bytes"]),
                _mb(run["sent_bytes"]),
                ", ".join(peer[-6:] for peer in run["group"] or run["last_group"]),
            ]
        )
        bans += [[name, ban["peer"], ban["kind"], ban["reason"]] for ban in run["banned"]]
    if rows:
        out.print()
        columns = ["averaging", "phase", "group", "rounds", "received", "sent", "partners"]
        print_table(out, columns, rows, fixed=["averaging", "phase"])
    if bans:
        out.print()
        print_table(out, ["averaging", "left out", "why", "reason"], bans, fixed=["averaging", "why"])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


STATUS: Final = View("/api/status", 2, _draw)
