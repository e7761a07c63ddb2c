"""Trackers: where a run's figures go besides its own ``metrics.jsonl``.

A tracker is told of every step and of the run's status; another one (W&B, MLflow) is one more class with the three
methods of :class:`Tracker` and a line in :func:`open_trackers`. A tracker's package is imported only when it is used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport


class Tracker(Protocol):
    def step(self, report: StepReport) -> None:
        """An optimizer step, or a held-out evaluation."""

    def status(self, status: RunStatus) -> None:
        """How the run is doing; once for each batch of steps."""

    def close(self) -> None:
        """Everything is on disk, or sent, when this returns."""


class Trackers:
    """All trackers of a run behind one object."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers
        self.steps_seen = 0
        """Reports taken so far: the number to ask the controller for what comes after."""

    def log(self, status: RunStatus, reports: Sequence[StepReport]) -> None:
        """Pass on new reports, and with them the status; a status without a new report tells no tracker anything."""
        self.steps_seen += len(reports)
        for tracker in self._trackers if reports else ():
            for report in reports:
                tracker.step(report)
            tracker.status(status)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(config: MonitorConfig, run_dir: Path) -> Trackers:
    """The trackers that ``config`` asks for, writing under ``run_dir``."""
    return Trackers([TensorBoardTracker(run_dir / "tensorboard")] if config.tensorboard else [])


class TensorBoardTracker:
    """TensorBoard event files, through tensorboard's own writer: torch's needs two seconds more to import."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        self._started = False

    def step(self, report: StepReport) -> None:
        if not self._started:
            self._start(report.step)
        self._write(report.step, report_scalars(report))

    def status(self, status: RunStatus) -> None:
        self._write(status.step, status_scalars(status))

    def close(self) -> None:
        self._writer.close()

    def _start(self, step: int) -> None:
        """Tell TensorBoard to forget what a run before this resume logged from ``step`` on: those steps are undone."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
        self._started = True

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def report_scalars(report: StepReport) -> dict[str, float]:
    """Tag to value. Positions count from 1, the first token that the draft guesses."""
    split = report.split
    scalars = {f"{split}/loss": report.loss, f"{split}/accept_length": report.accept_length}
    for position, (loss, accuracy) in enumerate(
        zip(report.loss_per_position, report.full_accuracy, strict=True), start=1
    ):
        scalars[f"{split}_position/loss_{position}"] = loss
        scalars[f"{split}_position/accuracy_{position}"] = accuracy
    if split == "train":
        scalars |= {
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/grad_norm": report.grad_norm,
            "step/tokens": report.tokens,
            "step/wait_seconds": report.wait_seconds,
            "step/fetch_seconds": report.fetch_seconds,
            "step/compute_seconds": report.compute_seconds,
            "step/optimizer_seconds": report.optimizer_seconds,
        }
    return scalars


def status_scalars(status: RunStatus) -> dict[str, float]:
    """Tag to value: what flows between the two pools."""
    return {
        "pools/inference_tokens_per_s": status.inference_tokens_per_s,
        "pools/inference_samples_per_s": status.inference_samples_per_s,
        "pools/training_tokens_per_s": status.training_tokens_per_s,
        "pools/training_samples_per_s": status.training_samples_per_s,
        "pools/queue_depth": status.queue_depth,
        "pools/rejected": status.samples.get("rejected", 0),
        "store/bytes": status.store_bytes,
        "store/credit_bytes": status.credit_bytes,
    }
