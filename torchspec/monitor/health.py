"""Is the run healthy? One answer for every view, from its newest snapshot and its latest events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchspec.monitor.bottleneck import plural
from torchspec.monitor.series import read_series, tail
from torchspec.monitor.snapshot import Snapshot
from torchspec.run_folder import RunFolder

RECENT_SECONDS = 180.0
"""For so long a fault is worth a warning."""
STALLED_SECONDS = 300.0
"""A run that shows none of its :data:`PROGRESS` for so long is stuck, or its steps are very long."""
PROGRESS = ("step", "captured_samples", "trained_samples", "rank_pause_seconds")
"""Counters of a history point: one of them grows all the time, in evaluations and checkpoints the last."""
CONTROLLER_SILENT_SECONDS = 10.0
AWAY_SECONDS = 60.0
"""A store that is away for longer is more than a warning."""
EVENTS_SECONDS = 3600.0
"""So far back a loss is looked for that has not been made good yet."""
FAULTS = {"worker_lost": "worker", "trainer_lost": "trainer", "store_lost": "store", "controller_lost": "controller"}
"""Kinds of events that are faults of the system, and what was lost."""

Level = Literal["good", "warning", "bad", "idle"]


@dataclass(frozen=True, slots=True)
class Health:
    level: Level
    headline: str
    text: str
    """One or two short lines."""


def assess_run(run_dir: Path, snapshot: Snapshot | None, live: bool, now: float) -> Health:
    """The health of the run in ``run_dir``; ``now`` in seconds since the epoch."""
    folder, newest = RunFolder(run_dir), now if live or snapshot is None else snapshot.time
    events = tail(folder.events, newest - EVENTS_SECONDS)
    history = tail(folder.history, newest - STALLED_SECONDS, before=True)
    return assess(snapshot, events, history, live, now)


def count_faults(run_dir: Path) -> int:
    """Faults of the system that the run has had so far."""
    return sum(event["kind"] in FAULTS for event in read_series(RunFolder(run_dir).events))


def assess(
    snapshot: Snapshot | None,
    events: Sequence[dict[str, Any]],
    history: Sequence[dict[str, Any]],
    live: bool,
    now: float,
) -> Health:
    """The health of a run.

    Args:
        events: the latest ones, oldest first; those of the last :data:`EVENTS_SECONDS` are enough.
        history: the latest points, oldest first; :data:`STALLED_SECONDS` of them are enough.
        live: its driver is there.
    """
    if snapshot is None:
        return Health("idle", "No data yet", "the run is starting" if live else "nothing was measured")
    if not live or snapshot.status.phase in ("finished", "stopped", "failed"):
        return _ended(snapshot, events)
    silence = now - snapshot.time
    if silence > CONTROLLER_SILENT_SECONDS:
        hint = "; if its machine is gone: torchspec resume" if silence > RECENT_SECONDS else ""
        return Health("bad", "Controller silent", f"not heard of for {_words(silence)}{hint}")
    alive = [worker for worker in snapshot.workers if worker.alive]
    training = snapshot.status.phase == "training"
    if (since := _store_lost(events)) is not None:
        level: Level = "bad" if now - since > AWAY_SECONDS else "warning"
        return Health(level, "Store away", f"{_words(now - since)} so far; nothing is captured until it is back")
    if training and not alive:
        return Health("bad", "No workers", "nobody captures samples")
    if _stalled(snapshot, history):
        nothing = f"no sample captured and no step made for {_words(STALLED_SECONDS)}"
        if any(worker.doing == "starting" for worker in alive) or (training and not snapshot.ranks):
            return Health("warning", "Nothing happens yet", f"{nothing}: engines or ranks are starting")
        return Health("bad", "Stalled", nothing)
    silent = [worker for worker in alive if worker.doing == "silent"]
    if silent:
        longest = _words(now - min(worker.heard for worker in silent))
        headline = f"{plural(len(silent), 'worker')} silent"
        return Health("warning", headline, f"{silent[0].name}: nothing heard for {longest}")
    faults = [event for event in events if event["kind"] in FAULTS and event["time"] > now - RECENT_SECONDS]
    if training and snapshot.status.step and not snapshot.ranks:
        return Health("warning", "No ranks", "the training group is being started again")
    if faults:
        newest = faults[-1]
        same = sum(event["kind"] == newest["kind"] for event in faults)
        what = FAULTS[newest["kind"]]
        lost = what.capitalize() if what in ("store", "controller") else plural(same, what)
        return Health("warning", f"{lost} lost", f"{_words(now - newest['time'])} ago: {newest['message']}")
    if snapshot.status.export_failure:
        return Health("warning", "No export", snapshot.status.export_failure)
    troubles = [event for event in events if event["kind"] == "trouble" and event["time"] > now - RECENT_SECONDS]
    if troubles:
        return Health("warning", "Trouble", troubles[-1]["message"])
    return Health("good", "Healthy", _calm(snapshot, len(alive)))


def _ended(snapshot: Snapshot, events: Sequence[dict[str, Any]]) -> Health:
    phase, failure = snapshot.status.phase, snapshot.status.export_failure
    if phase == "finished" and failure:
        return Health("bad", "Finished without an export", failure)
    if phase == "finished":
        return Health("good", "Finished", _losses(snapshot))
    if phase == "stopped":
        return Health("idle", "Stopped", "torchspec resume goes on")
    begun = max((place for place, event in enumerate(events) if event["kind"] == "resumed"), default=0)
    reasons = [event["message"] for event in events[begun:] if event["kind"] == "failed"]
    if phase == "failed" or reasons:
        return Health("bad", "Failed", reasons[-1] if reasons else "see the run's log")
    return Health("bad", "Not running", "it ended without a word; torchspec resume goes on from its last checkpoint")


def _store_lost(events: Sequence[dict[str, Any]]) -> float | None:
    """When the store was lost, if it is away now. A controller that starts begins with a store that is there."""
    states = [event for event in events if event["kind"] in ("store_lost", "store_back", "controller_lost", "resumed")]
    return float(states[-1]["time"]) if states and states[-1]["kind"] == "store_lost" else None


def _stalled(snapshot: Snapshot, history: Sequence[dict[str, Any]]) -> bool:
    """Whether nothing has come out of either pool for too long."""
    before = [point for point in history if point["time"] <= snapshot.time - STALLED_SECONDS]
    return bool(before) and all(before[-1][name] == history[-1][name] for name in PROGRESS)


def _calm(snapshot: Snapshot, workers: int) -> str:
    starting = sum(worker.doing == "starting" for worker in snapshot.workers)
    pool = plural(workers, "worker") + (f" ({starting} starting)" if starting else "")
    return f"{pool}, {plural(len(snapshot.ranks), 'rank')}\n{_losses(snapshot)}"


def _losses(snapshot: Snapshot) -> str:
    lost, rejected = snapshot.point.faults, snapshot.status.samples.get("rejected", 0)
    text = f"{plural(lost, 'recovered fault')} so far" if lost else "no faults so far"
    return text + (f", {rejected:,} samples rejected" if rejected else "")


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
