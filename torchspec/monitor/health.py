"""Is the run healthy? One answer for every view, from its newest snapshot and its latest events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchspec.monitor.series import tail
from torchspec.monitor.snapshot import Snapshot, metrics_dir

RECENT_SECONDS = 180.0
"""For so long a fault is worth a warning."""
CONTROLLER_SILENT_SECONDS = 10.0
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
    since = (now if live or snapshot is None else snapshot.time) - RECENT_SECONDS
    return assess(snapshot, tail(metrics_dir(run_dir) / "events.jsonl", since), live, now)


def assess(snapshot: Snapshot | None, events: Sequence[dict[str, Any]], live: bool, now: float) -> Health:
    """The health of a run.

    Args:
        events: the latest ones, oldest first; those of the last :data:`RECENT_SECONDS` are enough.
        live: its driver is there.
    """
    if snapshot is None:
        return Health("idle", "No data yet", "the run is starting" if live else "nothing was measured")
    if not live or snapshot.status.phase == "failed":
        return _ended(snapshot, events)
    silence = now - snapshot.time
    if silence > CONTROLLER_SILENT_SECONDS:
        return Health("bad", "Controller silent", f"not heard of for {_words(silence)}")
    alive = [worker for worker in snapshot.workers if worker.doing != "gone"]
    if not alive and snapshot.status.phase == "training":
        return Health("bad", "No workers", "nobody captures samples")
    silent = [worker for worker in alive if worker.doing == "silent"]
    if silent:
        longest = _words(now - min(worker.heard for worker in silent))
        return Health(
            "warning", _lost(len(silent), "worker", "silent"), f"{silent[0].name}: nothing heard for {longest}"
        )
    faults = [event for event in events if event["kind"] in FAULTS and event["time"] > now - RECENT_SECONDS]
    if faults:
        newest = faults[-1]
        same = sum(event["kind"] == newest["kind"] for event in faults)
        ago = _words(now - newest["time"])
        return Health("warning", _lost(same, FAULTS[newest["kind"]], "lost"), f"{ago} ago: {newest['message']}")
    return Health("good", "Healthy", _calm(snapshot, len(alive)))


def _ended(snapshot: Snapshot, events: Sequence[dict[str, Any]]) -> Health:
    phase = snapshot.status.phase
    if phase == "finished":
        return Health("good", "Finished", _losses(snapshot))
    if phase == "stopped":
        return Health("idle", "Stopped", "torchspec resume goes on")
    reasons = [event["message"] for event in events if event["kind"] == "failed"]
    if phase == "failed" or reasons:
        return Health("bad", "Failed", reasons[-1] if reasons else "see the run's log")
    return Health("bad", "Not running", "it ended without a word; torchspec resume goes on from its last checkpoint")


def _calm(snapshot: Snapshot, workers: int) -> str:
    starting = sum(worker.doing == "starting" for worker in snapshot.workers)
    pools = f"{workers} worker{'s' if workers != 1 else ''}" + (f" ({starting} starting)" if starting else "")
    ranks = len(snapshot.ranks)
    return f"{pools}, {ranks} rank{'s' if ranks != 1 else ''}\n{_losses(snapshot)}"


def _losses(snapshot: Snapshot) -> str:
    lost = snapshot.point.worker_losses + snapshot.point.trainer_losses
    rejected = snapshot.status.samples.get("rejected", 0)
    parts = [
        f"{lost} recovered faults so far" if lost > 1 else "1 recovered fault so far" if lost else "no faults so far"
    ]
    return ", ".join([*parts, *([f"{rejected:,} samples rejected"] if rejected else [])])


def _lost(count: int, what: str, state: str) -> str:
    if what in ("store", "controller"):
        return f"{what.capitalize()} {state}"
    return f"{count} {what}{'s' if count > 1 else ''} {state}"


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
