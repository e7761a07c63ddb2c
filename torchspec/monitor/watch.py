"""A run as a view that stays open sees it: files are read once, then only what was added to them."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torchspec.monitor.bottleneck import Verdict, judge_run
from torchspec.monitor.health import Health, assess
from torchspec.monitor.series import Follower
from torchspec.monitor.snapshot import Snapshot, read_latest
from torchspec.monitor.views import Record, undo
from torchspec.run_folder import RunFolder

HISTORY_KEPT, STEPS_KEPT, EVENTS_KEPT = 8192, 20_000, 1000


@dataclass(frozen=True)
class Look:
    """What was there at one moment."""

    snapshot: Snapshot | None
    live: bool
    verdict: Verdict
    health: Health
    history: list[Record]
    """Lines of ``history.jsonl``, oldest first; likewise the others."""
    train: list[Record]
    heldout: list[Record]
    events: list[Record]


class RunWatch:
    """Follows the run in ``run_dir``, also across its end and its being resumed."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        folder = RunFolder(run_dir)
        self._history = Follower(folder.history, HISTORY_KEPT)
        self._events = Follower(folder.events, EVENTS_KEPT)
        self._steps = Follower(folder.steps, STEPS_KEPT)

    def look(self) -> Look:
        """What is there now.

        Raises:
            ValueError: the files were written by a newer torchspec.
        """
        snapshot, live = read_latest(self.run_dir), RunFolder(self.run_dir).is_live()
        history, events = self._history.read(), self._events.read()
        train, heldout = undo(self._steps.read())
        verdict, health = judge_run(self.run_dir, live), assess(snapshot, events, history, live, time.time())
        return Look(snapshot, live, verdict, health, history, train, heldout, events)


def growth(history: list[Record], counter: str, cells: int) -> list[float]:
    """What a counter has grown a second, in each of at most ``cells`` stretches of equal time."""
    rates = []
    for first, last in _stretches(history, cells):
        grown = history[last][counter] - history[first][counter]
        rates.append(max(0.0, grown) / (history[last]["time"] - history[first]["time"]))  # less after a restart
    return rates


def course(history: list[Record], gauge: str, cells: int) -> list[float]:
    """Means of a gauge, in each of at most ``cells`` stretches of equal time."""
    return [fmean(point[gauge] for point in history[a : b + 1]) for a, b in _stretches(history, cells)]


def _stretches(history: list[Record], cells: int) -> Iterator[tuple[int, int]]:
    """First and last point of stretches of equal time: old points lie further apart than new ones."""
    times = [point["time"] for point in history]
    count = min(cells, len(times) - 1)
    for i in range(count):
        start, end = (times[0] + (times[-1] - times[0]) * j / count for j in (i, i + 1))
        first = bisect_right(times, start) - 1
        yield first, max(first + 1, min(bisect_left(times, end), len(times) - 1))
