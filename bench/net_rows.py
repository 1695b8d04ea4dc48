"""What the network benchmark measures: its rows, the pairings of peers, and the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KIB, MIB = 1024, 1024 * 1024
BULK_BYTES = 64 * MIB

Answer = dict[str, Any]
"""Of a peer to a measuring command: see net_ours.py."""


@dataclass(frozen=True)
class Leg:
    """A client and a server, each ``ours`` or ``stock``."""

    client: str
    server: str

    def __str__(self) -> str:
        return f"{self.client}→{self.server}"


OURS, OURS_STOCK, STOCK_OURS, BASE = (
    Leg("ours", "ours"),
    Leg("ours", "stock"),
    Leg("stock", "ours"),
    Leg("stock", "stock"),
)
LEGS = {str(leg): leg for leg in (OURS, OURS_STOCK, STOCK_OURS, BASE)}


@dataclass(frozen=True)
class Target:
    """A bound of a leg's median, relative to that of stock→stock or, with ``absolute``, as it is."""

    bound: float
    absolute: bool = False


@dataclass(frozen=True)
class Row:
    """One kind of measurement. ``arguments`` are those of the peers' command ``do``."""

    name: str
    do: str
    unit: str
    better: str
    """``lower`` or ``higher``; a target is the highest or the lowest value that will do."""
    arguments: dict[str, int]
    value: Callable[[Answer], float]
    targets: dict[Leg, Target]
    legs: tuple[Leg, ...] = tuple(LEGS.values())
    far: bool = False
    """Through the delaying proxy; the unit is its round trip."""
    cpu: bool = True
    """Whether CPU time per call means something."""


def median_ms(answer: Answer) -> float:
    return statistics.median(answer["seconds"]) * 1e3


def per_second(answer: Answer) -> float:
    return (answer["calls"] - answer["failed"]) / sum(answer["seconds"])


def megabytes_per_second(answer: Answer) -> float:
    return BULK_BYTES / statistics.median(answer["seconds"]) / 1e6


def busy_over_idle(answer: Answer) -> float:
    busy, idle = busy_parts(answer).values()
    return busy / idle


def busy_parts(answer: Answer) -> dict[str, float]:
    return {f"{name} p99 ms": p99(answer[name]) * 1e3 for name in ("busy", "idle")}


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


IN_ONE_ROUND_TRIP = dict.fromkeys((OURS, OURS_STOCK), Target(1.1, absolute=True))
ROWS = [
    *(
        Row(
            f"rtt-{name}",
            "call",
            "RTT",
            "lower",
            {"size": size, "count": 3},
            lambda answer: statistics.median(answer["seconds"]),
            IN_ONE_ROUND_TRIP,
            far=True,
            cpu=False,
        )
        for name, size in (("1k", KIB), ("64k", 64 * KIB), ("192k", 192 * KIB))
    ),
    Row(
        "call",
        "call",
        "ms",
        "lower",
        {"size": KIB, "count": 500},
        median_ms,
        {OURS: Target(1.3), OURS_STOCK: Target(1.2)},
    ),
    Row(
        "parallel",
        "parallel",
        "calls/s",
        "higher",
        {"size": KIB, "count": 2000},
        per_second,
        {OURS: Target(0.6), OURS_STOCK: Target(0.8)},
    ),
    Row("step", "step", "ms", "lower", {"size": 9 * KIB, "count": 500}, median_ms, {OURS: Target(0.6)}),
    Row(
        "bulk",
        "bulk",
        "MB/s",
        "higher",
        {"size": BULK_BYTES, "count": 3},
        megabytes_per_second,
        {OURS: Target(1.5), OURS_STOCK: Target(0.95), STOCK_OURS: Target(0.95)},
    ),
    Row(
        "busy",
        "busy",
        "p99/idle",
        "lower",
        {"size": KIB, "count": 500, "bulk": BULK_BYTES},
        busy_over_idle,
        {OURS: Target(3.0, absolute=True)},
        legs=(OURS, BASE),
        cpu=False,
    ),
]
GROUPS = ("rtt", "call", "parallel", "step", "bulk", "busy")
ABOUT = {
    "rtt": "a unary call over a connection with a round trip of 100 ms, same payload both ways; in round trips",
    "call": "a unary call on loopback, 1 KiB each way; p50",
    "parallel": "unary calls on loopback, 1 KiB each way, 50 at a time",
    "step": "a request and its response on an open stream, 9 KiB each way; p50",
    "bulk": "64 MiB over a stream of its own, from client to server",
    "busy": "p99 of 1 KiB steps beside 64 MiB transfers on the same connection, over their p99 without those",
}
