"""Families of samples as Prometheus reads them, named as all of this program's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from kwaainet_bridge.counting import Histogram

PREFIX: Final = "kwaainet_bridge_"

Rows = Iterable[tuple[tuple[str, ...], float]]
"""Values of labels, and the sample that has them."""


def gauge(name: str, about: str, rows: Rows, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, about, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, about: str, rows: Rows, labels: tuple[str, ...] = ()) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, about, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histogram(
    name: str, about: str, rows: Iterable[tuple[tuple[str, ...], Histogram]], labels: tuple[str, ...] = ()
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, about, labels=labels)
    for values, histogram in rows:
        buckets = [
            ("+Inf" if bound == float("inf") else str(bound), float(seen))
            for bound, seen in histogram.cumulative()
        ]
        family.add_metric(values, buckets, histogram.sum)
    return family
