"""A run's metrics in Prometheus' text format, made from the newest snapshot whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from torchspec.instruments import BOUNDS, Histogram
from torchspec.monitor.metrics import METRICS, PREFIX, Metric, read
from torchspec.monitor.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class SnapshotCollector(Collector):
    """Collects from one snapshot; little where there is none yet. The run's name is a label of every series."""

    def __init__(self, run: str, snapshot: Snapshot | None, live: bool):
        self._run, self._snapshot, self._live = run, snapshot, live

    def collect(self) -> Iterator[Family]:
        yield self._gauge("live", "1 while the run is running", float(self._live))
        if self._snapshot is not None:
            yield self._gauge("snapshot_time_seconds", "When the newest snapshot was taken", self._snapshot.time)
            for metric in METRICS:
                yield self._family(metric, self._snapshot)

    def _gauge(self, name: str, meaning: str, value: float) -> Family:
        family = GaugeMetricFamily(PREFIX + name, meaning, labels=["run"])
        family.add_metric([self._run], value)
        return family

    def _family(self, metric: Metric, snapshot: Snapshot) -> Family:
        name, help_text = PREFIX + metric.name, f"{metric.meaning} ({metric.unit or 'count'})"
        names = ["run", *metric.labels]
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        family = kinds[metric.kind](name, help_text, labels=names)
        for labels, value in read(metric, snapshot):
            values = [self._run, *(labels[name] for name in metric.labels)]
            if metric.kind == "histogram":
                histogram, total = value
                family.add_metric(values, _buckets(histogram), total)
            else:
                family.add_metric(values, value)
        return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound."""
    bounds = [*map(str, BOUNDS), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram)), strict=True))


def exposition(run: str, snapshot: Snapshot | None, live: bool) -> bytes:
    """The text that ``/metrics`` answers with."""
    return generate_latest(SnapshotCollector(run, snapshot, live))
