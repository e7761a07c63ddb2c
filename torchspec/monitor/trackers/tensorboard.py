"""TensorBoard event files, through tensorboard's own writer: torch's needs two seconds more to import."""

from __future__ import annotations

import time
from pathlib import Path

from torchspec.contracts import RunStatus, StepReport
from torchspec.monitor.trackers.scalars import report_scalars, status_scalars


class TensorBoardTracker:
    """Writes to ``tensorboard`` in the run's folder."""

    def __init__(self, run_dir: Path, _project: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
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
