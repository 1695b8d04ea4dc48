"""What our node says of itself to Prometheus: where the time of its steps goes, how late its event loop is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
from prometheus_client.metrics_core import Sample
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "kwaainet_bridge_"
LAG = "event_loop_lag_seconds_bucket"


def metrics_of(socket: Path) -> str:
    """The metrics of the node whose admin side listens on ``socket``, as text."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
        return client.get("http://node/metrics").raise_for_status().text


def value(text: str, name: str, **labels: str) -> float:
    """The sum of all samples of that name which have these labels."""
    return sum(sample.value for sample in _samples(text, name) if labels.items() <= sample.labels.items())


def lag_quantile(before: str, after: str, share: float) -> float:
    """In between, the least bound in seconds within which ``share`` of the event loop's turns came."""
    at_first = {sample.labels["le"]: sample.value for sample in _samples(before, LAG)}
    counts = {
        float(sample.labels["le"]): sample.value - at_first[sample.labels["le"]]
        for sample in _samples(after, LAG)
    }
    return min(bound for bound, count in counts.items() if count >= share * max(counts.values()))


def milliseconds(before: str, after: str) -> dict[str, float]:
    """The mean of each part of a step in between: reading, waiting and computing in the engine, replying."""
    at_first, means = dict(_parts(before)), {}
    for part, (seconds, count) in _parts(after):
        if steps := count - at_first[part][1]:
            means[part] = 1000 * (seconds - at_first[part][0]) / steps
    return means


def _samples(text: str, name: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from (sample for sample in family.samples if sample.name == PREFIX + name)


def _parts(text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Of each part of a step: seconds since the node began, and how many were counted."""
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
