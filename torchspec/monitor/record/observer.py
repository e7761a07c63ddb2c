"""What a run tells about itself: rates, reports, recent events; the files of ``monitor/snapshot.py``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from torchspec.config.schema import Config
from torchspec.contracts import RunStatus, SampleId, SampleRef, SampleTiming, StepReport, WorkerReport
from torchspec.controller.credits import Credits
from torchspec.controller.ledger import Ledger, Record
from torchspec.controller.prompts import Prompts
from torchspec.files import JsonLines
from torchspec.instruments import Rate
from torchspec.monitor.health import FAULTS, count_faults
from torchspec.monitor.record.ray_metrics import RayMetrics
from torchspec.monitor.record.recorder import EventLog, Recorder
from torchspec.monitor.record.telemetry import Telemetry
from torchspec.monitor.record.timeline import PER_SECOND, Moment, Timelines
from torchspec.monitor.snapshot import EventKind, Snapshot
from torchspec.run_folder import RunFolder

log = logging.getLogger(__name__)

RECENT_MESSAGES = 20


class Observer:
    """Takes note of what happens and sums it up in a :class:`RunStatus` and in snapshots.

    Args:
        interval: seconds between two snapshots; 0 for none.
    """

    def __init__(self, run_dir: Path, interval: float):
        self.interval = interval
        self.workers: dict[str, WorkerReport] = {}
        self._steps: list[StepReport] = []
        self._steps_taken = 0  # before those
        self.telemetry = Telemetry()
        self.timelines = Timelines(run_dir, PER_SECOND if interval else 0)
        self._last: dict[str, StepReport] = {}
        self._messages: list[str] = []
        self._metrics = JsonLines(RunFolder(run_dir).steps)
        self._events = EventLog(run_dir)
        self._recorder, self._recording = Recorder(run_dir), asyncio.Lock()
        self._ray_metrics: RayMetrics | None = None
        self.news = asyncio.Event()
        """There is something that a person should see at once."""
        self._inference, self._training = Rate(), Rate()
        self._started = time.monotonic()
        self.telemetry.totals["faults"] = count_faults(run_dir)  # of controllers before this one, too

    def note(self, message: str, kind: EventKind = "note", **detail: Any) -> None:
        """An event worth a person's attention."""
        log.info(message)
        self._events.write(time.time(), kind, message, **detail)
        self.telemetry.totals["faults"] += kind in FAULTS
        self._messages.append(message)
        del self._messages[:-RECENT_MESSAGES]
        if kind in FAULTS or kind == "scaled":
            self.news.set()

    # ---- inference ----

    def worker_started(self, worker: str) -> None:
        self.telemetry.worker_started(worker)
        self.note(f"{worker} is starting", "worker_started", worker=worker)

    def worker_reported(self, report: WorkerReport) -> None:
        if self.telemetry.is_gone(report.worker):  # its last words come late
            return
        self.workers[report.worker] = report
        if self.telemetry.worker_report(report):
            self.note(f"{report.worker} is ready", "worker_ready", worker=report.worker)

    def worker_left(self, worker: str) -> None:
        self.workers.pop(worker, None)
        self.telemetry.worker_gone(worker, "ended")
        self.note(f"{worker} has ended; it was not needed any more", "worker_left", worker=worker)

    def worker_lost(self, worker: str, leases: int) -> None:
        self.workers.pop(worker, None)
        self.telemetry.worker_gone(worker, "gone")
        self.telemetry.totals["worker_losses"] += 1
        message = f"{worker} is gone; {leases} of its leases are pending again"
        self.note(message, "worker_lost", worker=worker, leases=leases)

    def blocked(self, by_credits: bool = False, by_window: bool = False) -> None:
        """A worker asked for leases and was refused some for want of credits, or because the window is full."""
        self.telemetry.credit_blocked.set(by_credits)
        self.telemetry.window_blocked.set(by_window)

    def stored(self, ref: SampleRef, timing: SampleTiming | None) -> None:
        self._inference.add(1, ref.num_tokens)
        self.telemetry.totals.update(captured_samples=1, captured_tokens=ref.num_tokens)
        self.timelines.published(ref.sample, timing)

    def failed(self, worker: str, sample: SampleId, name: str, reason: str) -> None:
        self.telemetry.totals["retries"] += 1
        self.timelines.mark([sample], "failed", reason)
        self.note(f"{worker} failed {name}: {reason}", "sample_failed", worker=worker, sample=str(sample))

    # ---- training ----

    def mark(self, records: Iterable[Record], moment: Moment, detail: str = "") -> None:
        """The same happened to all of these samples."""
        self.timelines.mark((record.sample for record in records), moment, detail)

    def trainer_started(self, generation: int, dp_size: int, sp_size: int) -> None:
        message = f"training group {generation} starts: dp_size {dp_size}, sp_size {sp_size}"
        self.note(message, "trainer_started", generation=generation, dp_size=dp_size, sp_size=sp_size)

    def trainer_ended(self, broken: bool) -> None:
        self.telemetry.ranks_gone()
        if broken:
            self.telemetry.totals["trainer_losses"] += 1
            self.note("the training group is lost; it starts again", "trainer_lost")

    def trained(self, records: Sequence[Record]) -> None:
        tokens = sum(record.ref.num_tokens for record in records if record.ref is not None)
        self._training.add(len(records), tokens)
        self.telemetry.totals.update(trained_samples=len(records), trained_tokens=tokens)
        self.mark(records, "trained")

    def sample_lost(self, record: Record, name: str) -> None:
        self.telemetry.totals["lost_objects"] += 1
        self.timelines.mark([record.sample], "lost", "not in the store")
        self.note(f"the store lost {name}; it is captured again", "sample_lost", sample=str(record.sample))

    def rejected(self, sample: SampleId, name: str, reason: str) -> None:
        self.timelines.forget(sample)
        self.note(f"rejected {name}: {reason}", "rejected", sample=str(sample))

    def freed(self, record: Record, samples: Prompts) -> None:
        if record.ref is not None and self.timelines.follows(record.sample):  # a rewind may have come between
            name, tokens = samples.name(record.sample), samples.tokens(record.sample)
            self.timelines.finish(record.ref, name, record.step, *tokens)

    # ---- the run ----

    def resumed(self, step: int) -> None:
        self.note(f"resumed after step {step}", "resumed", step=step)

    def committed(self, step: int, folder: str, best: bool) -> None:
        message = f"checkpoint {folder}" + (" (best so far)" if best else "")
        self.note(message, "checkpoint", step=step, best=best)

    def ended(self, phase: str, step: int) -> None:
        self.note(f"{phase} after step {step}", "finished", step=step)

    async def record(self, status: RunStatus) -> None:
        """Write a snapshot, if any are wanted. The event loop goes on meanwhile."""
        if self.interval:
            async with self._recording:
                try:
                    await asyncio.to_thread(self._write, self.telemetry.snapshot(status))
                except OSError as error:  # a disk that is full for a while must not end what watches it
                    log.warning("no snapshot: %s", error)

    def _write(self, snapshot: Snapshot) -> None:
        self._recorder.write(snapshot)
        if ray.is_initialized():
            self._ray_metrics = self._ray_metrics or RayMetrics(snapshot.status.run)
            self._ray_metrics.update(snapshot)

    def report(self, report: StepReport) -> None:
        """An optimizer step or a held-out evaluation."""
        self._last[report.split] = report
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

    def status(self, config: Config, phase: str, ledger: Ledger, heldout: Ledger, credit: Credits) -> RunStatus:
        total, counts = ledger.total_steps, ledger.counts()
        left = counts.total() - counts["trained"] - counts["committed"] - counts["rejected"]
        left = min(left, (total - ledger.trained_step) * config.training.batch_size)
        rate = self._training.samples_per_s
        return RunStatus(
            run=config.run.name,
            phase=phase,
            step=ledger.trained_step,
            total_steps=total,
            epoch=min(ledger.trained_cursor // ledger.shape.prompts, config.training.epochs - 1),
            epochs=config.training.epochs,
            samples=dict(counts),
            store_bytes=ledger.stored_bytes() + heldout.stored_bytes(),
            store_capacity=credit.capacity,
            credit_bytes=credit.used,
            queue_depth=ledger.ready(),
            workers=tuple(self.workers[name] for name in sorted(self.workers)),
            last_step=self._last.get("train"),
            last_heldout=self._last.get("heldout"),
            inference_tokens_per_s=self._inference.tokens_per_s,
            inference_samples_per_s=self._inference.samples_per_s,
            training_tokens_per_s=self._training.tokens_per_s,
            training_samples_per_s=rate,
            eta_seconds=left / rate if rate else None,
            uptime_seconds=time.monotonic() - self._started,
            messages=tuple(self._messages),
        )

    def close(self) -> None:
        self._metrics.close()
