"""TensorBoard event files, through tensorboard's own writer: torch's needs two seconds more to import."""

from __future__ import annotations

import time
from pathlib import Path

from torchspec.contracts import StepReport
from torchspec.monitor.trackers import Tracker


class TensorBoardTracker(Tracker):
    """Writes to ``tensorboard`` in the run's folder."""

    def __init__(self, run_dir: Path, _project: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        self._last: int | None = None

    def step(self, report: StepReport) -> None:
        if report.split == "train":
            if self._last is None or report.step <= self._last:
                self._forget(report.step)
            self._last = report.step
        super().step(report)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()

    def _forget(self, step: int) -> None:
        """Tell TensorBoard to forget what was logged from ``step`` on before: those steps have been undone."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
