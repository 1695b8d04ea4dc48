"""Where our node says that the time of its steps goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

Totals = dict[str, tuple[float, float]]
"""Of each part of a step: seconds since the node began, and how many were counted."""

PREFIX = "kwaainet_bridge_"


def totals(socket: Path) -> Totals:
    """What the node whose admin side listens on ``socket`` has counted."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
        text = client.get("http://node/metrics").raise_for_status().text
    return dict(_parts(text))


def milliseconds(before: Totals, after: Totals) -> dict[str, float]:
    """The mean of each part in between: reading, waiting and computing in the engine, replying."""
    means = {}
    for part, (seconds, count) in after.items():
        if steps := count - before[part][1]:
            means[part] = 1000 * (seconds - before[part][0]) / steps
    return means


def _parts(text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix(PREFIX)
        if name not in ("step_seconds", "queue_seconds", "batch_seconds"):
            continue
        sums = {
            suffix: {
                sample.labels.get("phase"): sample.value
                for sample in family.samples
                if sample.name.endswith(suffix)
            }
            for suffix in ("_sum", "_count")
        }
        for phase, seconds in sums["_sum"].items():
            yield phase or name.removesuffix("_seconds"), (seconds, sums["_count"][phase])
