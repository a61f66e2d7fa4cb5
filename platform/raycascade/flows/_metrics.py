"""A gateway's totals as metrics of Ray: each node's metrics endpoint exports them, "ray_" in front of the names."""

from collections.abc import Mapping
from typing import cast

from ray.serve import metrics

from raycascade.serving.telemetry import METRICS

PREFIX = "ray_"  # Ray's own, in front of every name that it exports
BIRTH = 5e-324  # the smallest increment there is: a counter that is there, and at 0 for whoever reads it


class RayMetrics:
    """The sink of a replica's `Telemetry`. Made in the replica: every series says which one, and of which application.

    Counters are counters. The parts of histograms are gauges of running totals under the names that Prometheus expects
    (_bucket, _sum, _count): Ray's own histogram would take every observation by itself, only bounds above 0, and tells
    sums from the middles of buckets.
    """

    def __init__(self) -> None:
        self._counters: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._told: dict[tuple[str, ...], float] = {}
        for metric in METRICS.values():
            if metric.kind == "counter":
                self._counters[metric.name] = metrics.Counter(metric.name, metric.help, _tags(metric.labels))
                continue
            for series in metric.series:
                labels = (*metric.labels, "le") if series.endswith("_bucket") else metric.labels
                self._gauges[series] = metrics.Gauge(series, metric.help, _tags(labels))

    def set(self, series: str, labels: Mapping[str, str], total: float) -> None:
        """The total of a series as of now."""
        if series in self._gauges:
            self._gauges[series].set(float(total), dict(labels))
            return
        key = (series, *labels.values())
        if key not in self._told:
            self._told[key] = 0.0
            self._counters[series].inc(BIRTH, dict(labels))
        if total > self._told[key]:
            self._counters[series].inc(float(total - self._told[key]), dict(labels))
            self._told[key] = total


def _tags(labels: tuple[str, ...]) -> tuple[str]:
    """Ray declares these tuples as if they held one name; they may hold any number."""
    return cast("tuple[str]", labels)
