"""The same metrics in Ray's own: who scrapes a Ray cluster sees its runs there, too (as ``ray_torchspec_...``).

Totals and the draft's curves only; each worker and each rank stand at the run's own ``/metrics``.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

from torchspec.monitor.metrics import METRICS, PREFIX, read
from torchspec.monitor.snapshot import Snapshot


class RayMetrics:
    """Gauges of one run; counters are gauges here, too, because Ray's own can only be incremented."""

    def __init__(self, run: str):
        self._run = run
        self._gauges = {
            metric: Gauge(PREFIX + metric.name, metric.meaning, tag_keys=("run", *metric.labels))
            for metric in METRICS
            if metric.scope in ("run", "pools", "draft")
        }

    def update(self, snapshot: Snapshot) -> None:
        for metric, gauge in self._gauges.items():
            for labels, value in read(metric, snapshot):
                gauge.set(value, {"run": self._run, **labels})
