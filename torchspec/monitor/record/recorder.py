"""Writes what ``monitor/snapshot.py`` describes into the run's folder. One writer a run: the controller."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.files import write_atomically
from torchspec.monitor.series import Series
from torchspec.monitor.snapshot import (
    RANK_COLUMNS,
    WORKER_COLUMNS,
    EntityPoint,
    Event,
    EventKind,
    Snapshot,
    adapter,
    to_line,
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
        folder = self._folder = RunFolder(run_dir)
        self._history = Series(folder.history, HISTORY_LINES, HISTORY_RECENT)
        self._entities = Series(folder.entities, ENTITY_LINES, ENTITY_RECENT)
        self._entities_due = 0.0

    def write(self, snapshot: Snapshot) -> None:
        self._history.append(to_line(snapshot.point))
        if snapshot.time >= self._entities_due:
            self._entities.append(to_line(_entity_point(snapshot)))
            self._entities_due = snapshot.time + ENTITY_SECONDS
        latest = replace(snapshot, status=replace(snapshot.status, workers=()))  # which snapshot.workers say already
        write_atomically(self._folder.latest, lambda file: file.write(adapter(Snapshot).dump_json(latest)))


def _entity_point(snapshot: Snapshot) -> EntityPoint:
    """The few counters of each worker and rank that are kept over time."""
    return EntityPoint(
        snapshot.time,
        {w.name: tuple(getattr(w.report, name) for name in WORKER_COLUMNS) for w in snapshot.workers if w.alive},
        {str(r.rank): tuple(getattr(r.report, name) for name in RANK_COLUMNS) for r in snapshot.ranks},
    )


class EventLog:
    """Appends to a run's ``events.jsonl``: the controller while it lives, the driver when it does not."""

    def __init__(self, run_dir: Path):
        self._events = Series(RunFolder(run_dir).events, EVENT_LINES, EVENT_RECENT)

    def write(self, time: float, kind: EventKind, message: str, **detail: Any) -> None:
        self._events.append(to_line(Event(time, kind, message, detail)))
