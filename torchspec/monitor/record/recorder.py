"""Writes what ``monitor/snapshot.py`` describes into the run's folder. One writer a run: the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec.monitor.series import Series
from torchspec.monitor.snapshot import (
    Event,
    EventKind,
    Snapshot,
    entity_point,
    to_line,
    write_latest,
)
from torchspec.run_folder import RunFolder

HISTORY_LINES, HISTORY_RECENT = 8192, 1800
"""At one every two seconds: an hour in full, the rest of the run as some two thousand points."""
ENTITY_LINES, ENTITY_RECENT = 2048, 360
ENTITY_SECONDS = 10.0
EVENT_LINES, EVENT_RECENT = 20_000, 5_000


class Recorder:
    """Files of one run. Not thread-safe: one call at a time."""

    def __init__(self, run_dir: Path):
        self._run_dir, folder = run_dir, RunFolder(run_dir)
        self._history = Series(folder.history, HISTORY_LINES, HISTORY_RECENT)
        self._entities = Series(folder.entities, ENTITY_LINES, ENTITY_RECENT)
        self._entities_due = 0.0

    def write(self, snapshot: Snapshot) -> None:
        self._history.append(to_line(snapshot.point))
        if snapshot.time >= self._entities_due:
            self._entities.append(to_line(entity_point(snapshot)))
            self._entities_due = snapshot.time + ENTITY_SECONDS
        write_latest(self._run_dir, snapshot)


class EventLog:
    """Appends to a run's ``events.jsonl``: the controller while it lives, the driver when it does not."""

    def __init__(self, run_dir: Path):
        self._events = Series(RunFolder(run_dir).events, EVENT_LINES, EVENT_RECENT)

    def write(self, time: float, kind: EventKind, message: str, **detail: Any) -> None:
        self._events.append(to_line(Event(time, kind, message, detail)))
