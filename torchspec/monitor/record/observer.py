"""What a run tells about itself: rates, reports, recent events; the files of ``monitor/snapshot.py``.

It is told by the controller, in names and numbers; it knows nothing of the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from torchspec.contracts import RankReport, RunStatus, SampleId, SampleRef, SampleTiming, StepReport, WorkerReport
from torchspec.data.conversations import printable
from torchspec.files import JsonLines
from torchspec.instruments import Rate
from torchspec.monitor.health import FAULTS, count_faults
from torchspec.monitor.metrics import METRICS, PREFIX, read
from torchspec.monitor.record.recorder import EventLog, Recorder
from torchspec.monitor.record.telemetry import Telemetry
from torchspec.monitor.record.timeline import PER_SECOND, Timelines
from torchspec.monitor.record.write_queue import WriteQueue
from torchspec.monitor.snapshot import EventKind, Snapshot
from torchspec.run_folder import RunFolder

log = logging.getLogger(__name__)

RECENT_MESSAGES = 20


class Observer:
    """Takes note of what happens, and writes it down: a snapshot every ``interval`` seconds, none where that is 0."""

    def __init__(self, run_dir: Path, interval: float):
        self.interval = interval
        self.workers: dict[str, WorkerReport] = {}
        """The last report of each that is at work."""
        self.last: dict[str, StepReport] = {}
        """The last report of a step (``train``) and of an evaluation (``heldout``)."""
        self.inference, self.training = Rate(), Rate()
        self.export_failure = ""
        """Of the last checkpoint's draft, if it has failed."""
        self.messages: list[str] = []
        """Recent events worth a person's attention, oldest first."""
        self.started = time.monotonic()
        self._steps: list[StepReport] = []
        self._steps_taken = 0  # before those
        self.files = WriteQueue(run_dir)
        """Writes all that the controller writes."""
        self.timelines = Timelines(run_dir, PER_SECOND if interval else 0, put=self.files.put_for_views)
        """Where each sample goes, which its movers tell at once."""
        self._telemetry = Telemetry()
        self._metrics = JsonLines(RunFolder(run_dir).steps, self.files.put_for_views)
        self._events = EventLog(run_dir)
        self._recorder, self._recording = Recorder(run_dir), asyncio.Lock()
        self._ray_metrics: RayMetrics | None = None
        self.news = asyncio.Event()
        """There is something that a person should see at once."""
        self._telemetry.totals["faults"] = count_faults(run_dir)  # of controllers before this one, too

    def note(self, message: str, kind: EventKind = "note", **detail: Any) -> None:
        """An event worth a person's attention; whatever a name or a reason holds, it stays one line of text."""
        message = printable(message)
        self.files.put_for_views(log.info, message)
        self.files.put_for_views(partial(self._events.write, time.time(), kind, message, **detail))
        self._telemetry.totals["faults"] += kind in FAULTS
        self.messages.append(message)
        del self.messages[:-RECENT_MESSAGES]
        if kind in FAULTS or kind in ("scaled", "trouble", "export_failed"):
            self.news.set()

    # ---- inference ----

    def worker_started(self, worker: str) -> None:
        self._telemetry.worker_started(worker)
        self.note(f"{worker} is starting", "worker_started", worker=worker)

    def worker_reported(self, report: WorkerReport) -> None:
        if self._telemetry.is_gone(report.worker):  # its last words come late
            return
        self.workers[report.worker] = report
        if self._telemetry.worker_report(report):
            self.note(f"{report.worker} is ready", "worker_ready", worker=report.worker)

    def worker_left(self, worker: str) -> None:
        self.workers.pop(worker, None)
        self._telemetry.worker_gone(worker, "ended")
        self.note(f"{worker} has ended; it was not needed any more", "worker_left", worker=worker)

    def worker_lost(self, worker: str, leases: int) -> None:
        self.workers.pop(worker, None)
        self._telemetry.worker_gone(worker, "gone")
        self._telemetry.totals["worker_losses"] += 1
        message = f"{worker} is gone; {leases} of its leases are pending again"
        self.note(message, "worker_lost", worker=worker, leases=leases)

    def scaled(self, workers: int, reason: str) -> None:
        self.note(f"inference workers: {workers}, because {reason}", "scaled", workers=workers)

    def blocked(self, by_credits: bool = False, by_window: bool = False) -> None:
        """A worker asked for leases and was refused some for want of credits, or because the window is full."""
        self._telemetry.credit_blocked.set(by_credits)
        self._telemetry.window_blocked.set(by_window)

    def stored(self, ref: SampleRef, timing: SampleTiming | None) -> None:
        self.inference.add(1, ref.num_tokens)
        self._telemetry.totals.update(captured_samples=1, captured_tokens=ref.num_tokens)
        self.timelines.published(ref.sample, timing)

    def failed(self, worker: str, sample: SampleId, name: str, reason: str) -> None:
        self._telemetry.totals["retries"] += 1
        self.note(f"{worker} failed {name}: {reason}", "sample_failed", worker=worker, sample=str(sample))

    # ---- samples ----

    def sample_lost(self, sample: SampleId, name: str) -> None:
        self._telemetry.totals["lost_objects"] += 1
        self.note(f"the store lost {name}; it is captured again", "sample_lost", sample=str(sample))

    def rejected(self, sample: SampleId, name: str, reason: str) -> None:
        self.note(f"rejected {name}: {reason}", "rejected", sample=str(sample))

    def trained(self, samples: int, tokens: int) -> None:
        self.training.add(samples, tokens)
        self._telemetry.totals.update(trained_samples=samples, trained_tokens=tokens)

    # ---- training ----

    def rank_reported(self, report: RankReport) -> None:
        self._telemetry.rank_report(report)

    @property
    def ranks_pause(self) -> bool:
        """Whether ranks evaluate or save."""
        return self._telemetry.pausing

    def trainer_started(self, generation: int, dp_size: int, sp_size: int) -> None:
        message = f"training group {generation} starts: dp_size {dp_size}, sp_size {sp_size}"
        self.note(message, "trainer_started", generation=generation, dp_size=dp_size, sp_size=sp_size)

    def trainer_ended(self, broken: bool) -> None:
        self._telemetry.ranks_gone()
        if broken:
            self._telemetry.totals["trainer_losses"] += 1
            self.note("the training group is lost; it starts again", "trainer_lost")

    # ---- the run ----

    def resumed(self, step: int) -> None:
        self.note(f"resumed after step {step}", "resumed", step=step)

    def committed(self, step: int, folder: str, best: bool, failure: str) -> None:
        message = f"checkpoint {folder}" + (" (best so far)" if best else "")
        self.note(message, "checkpoint", step=step, best=best)
        if failure:
            self.note(f"after the checkpoint of step {step}: {failure}", "trouble", step=step)

    def exported(self, step: int, failure: str) -> None:
        self.export_failure = failure
        if failure:
            self.note(f"the draft of step {step} was not exported: {failure}", "export_failed", step=step)

    def ended(self, phase: str, step: int) -> None:
        self.note(f"{phase} after step {step}", "finished", step=step)

    async def record(self, status: RunStatus) -> None:
        """Write a snapshot, if any are wanted; one at a time, so a slow disk gets fewer of them."""
        if self.interval:
            async with self._recording:
                written = self.files.put_for_views(self._write, self._telemetry.snapshot(status))
                await asyncio.wrap_future(written)

    def _write(self, snapshot: Snapshot) -> None:
        self._recorder.write(snapshot)
        if ray.is_initialized():
            self._ray_metrics = self._ray_metrics or RayMetrics(snapshot.status.run)
            self._ray_metrics.update(snapshot)

    def report(self, report: StepReport) -> None:
        """An optimizer step or a held-out evaluation. Hearing of it twice does no harm."""
        if report == self.last.get(report.split):
            return
        self.last[report.split] = report
        self._steps.append(report)
        self._metrics.write({"time": time.time(), **asdict(report)})

    def steps_since(self, count: int) -> list[StepReport]:
        """Reports after the first ``count``. Nobody needs the others any more, and they are forgotten.

        Who has lost touch with the controller counts from 0 again, and goes on with what is left.
        """
        if count >= self._steps_taken:
            del self._steps[: count - self._steps_taken]
        self._steps_taken = count
        return list(self._steps)

    async def close(self) -> None:
        """Everything is written when this returns. Raises WriteFailed: it cannot be."""
        await self.files.close()


class RayMetrics:
    """The same metrics in Ray's own: who scrapes a Ray cluster sees its runs there, too (as ``ray_torchspec_...``).

    Totals and the draft's curves only; each worker and each rank stand at the run's own ``/metrics``. Counters are
    gauges here, too, because Ray's own can only be incremented.
    """

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
