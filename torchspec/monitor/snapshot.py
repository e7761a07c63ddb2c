"""What a run writes about itself every two seconds, and what every view reads: the run's folder is the only source.

Which record lies in which file stands in ``run_folder.py``, what these numbers mean in
``monitor/metrics.py``. Times are seconds since the epoch, on the controller's clock. Counters start at 0 with each
controller, so a smaller value than before marks a restart.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from torchspec.contracts import RankReport, RunStatus, WorkerReport
from torchspec.monitor.series import read_series
from torchspec.run_folder import RunFolder

SCHEMA = 1
"""Of all files here; a reader refuses a newer one."""

EventKind = Literal[
    "resumed",
    "stopping",
    "finished",
    "failed",
    "worker_started",
    "worker_ready",
    "worker_lost",
    "worker_left",
    "sample_failed",
    "sample_lost",
    "rejected",
    "checkpoint",
    "export_failed",
    "trouble",
    "scaled",
    "trainer_started",
    "trainer_lost",
    "store_lost",
    "controller_lost",
    "store_back",
    "evaluated",
    "note",
]

WorkerDoing = Literal["starting", "working", "waiting", "silent", "gone", "ended"]
"""``silent``: nothing was heard of it for :data:`SILENT_SECONDS`. ``gone``: it died. ``ended``: nobody needs it now."""

SILENT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """The whole run in one flat record. Below ``ranks_waiting`` all numbers are counters."""

    time: float
    phase: str
    step: int
    samples: dict[str, int]
    queue_depth: int
    store_bytes: int
    store_capacity_bytes: int
    credit_bytes: int
    workers: int
    workers_waiting: int
    ranks: int
    ranks_waiting: int
    captured_samples: int = 0
    captured_tokens: int = 0
    answer_tokens: int = 0
    trained_samples: int = 0
    trained_tokens: int = 0
    put_bytes: int = 0
    put_seconds: float = 0.0
    get_bytes: int = 0
    get_seconds: float = 0.0
    worker_seconds: float = 0.0
    worker_busy_seconds: float = 0.0
    worker_engine_seconds: float = 0.0
    rank_seconds: float = 0.0
    rank_wait_seconds: float = 0.0
    rank_forward_seconds: float = 0.0
    rank_backward_seconds: float = 0.0
    rank_reduce_seconds: float = 0.0
    rank_optimizer_seconds: float = 0.0
    rank_pause_seconds: float = 0.0
    credit_blocked_seconds: float = 0.0
    window_blocked_seconds: float = 0.0
    retries: int = 0
    lost_objects: int = 0
    worker_losses: int = 0
    trainer_losses: int = 0
    faults: int = 0
    """Of every kind, since the run began: the only counter that goes on when a controller starts again."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One inference worker. Rates and latencies are those of the last half minute."""

    name: str
    doing: WorkerDoing
    since: float
    """When it was started."""
    heard: float
    """When it was last heard of."""
    report: WorkerReport
    samples_per_s: float = 0.0
    tokens_per_s: float = 0.0
    put_bytes_per_s: float = 0.0
    """While puts were under way, so it compares with the store's bandwidth; 0 without puts."""
    put_p50_seconds: float | None = None
    put_p99_seconds: float | None = None
    wait_share: float = 0.0
    """Of the time, holding no lease."""

    @property
    def alive(self) -> bool:
        return self.doing not in ("gone", "ended")


@dataclass(frozen=True, slots=True)
class RankState:
    """One training rank. Rates, shares and latencies are those of the last half minute, or of four steps."""

    rank: int
    heard: float
    report: RankReport
    tokens_per_s: float = 0.0
    step_seconds: float | None = None
    wait_share: float = 0.0
    forward_share: float = 0.0
    backward_share: float = 0.0
    reduce_share: float = 0.0
    optimizer_share: float = 0.0
    pause_share: float = 0.0
    get_bytes_per_s: float = 0.0
    """While gets were under way; 0 without gets."""
    get_p50_seconds: float | None = None
    get_p99_seconds: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation of the whole time, waits included; None where the device's peak is not known."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is known at one moment."""

    status: RunStatus
    """As the terminal shows it; its ``workers`` are those of this snapshot that are alive."""
    point: HistoryPoint
    workers: tuple[WorkerState, ...]
    """By name; those that are no more stay for a while."""
    ranks: tuple[RankState, ...]
    measured_accept_length: float | None = None
    """In a real server, if ``torchspec eval`` has measured it; a reader fills it in."""
    schema: int = SCHEMA

    @property
    def time(self) -> float:
        return self.point.time


@dataclass(frozen=True, slots=True)
class EntityPoint:
    """Counters of each worker (by name) and rank (by number); rates are differences over time."""

    time: float
    workers: dict[str, tuple[float, ...]]
    """In the order of :data:`WORKER_COLUMNS`."""
    ranks: dict[str, tuple[float, ...]]
    """In the order of :data:`RANK_COLUMNS`."""


RANK_PARTS = ("wait", "forward", "backward", "reduce", "optimizer", "pause")
"""What becomes of a rank's time."""
WORKER_COLUMNS = ("samples", "tokens", "put_bytes", "busy_seconds", "seconds")
RANK_COLUMNS = ("tokens", "wait_seconds", "seconds", "get_bytes", "fetched_steps")


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a person's attention."""

    time: float
    kind: EventKind
    message: str
    detail: dict[str, Any] = field(default_factory=dict)
    """By kind: ``worker``, ``rank``, ``step``, ``sample``, ``best`` and the like."""


@cache
def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Reads and writes a dataclass as JSON."""
    return TypeAdapter(kind)


def to_line(record: Any) -> bytes:
    """A record of any of the dataclasses here as a line of its file."""
    return adapter(record.__class__).dump_json(record) + b"\n"


def read_latest(run_dir: Path) -> Snapshot | None:
    """The newest snapshot; None before the first.

    Raises:
        ValueError: it was written by a newer torchspec.
    """
    try:
        text = RunFolder(run_dir).latest.read_bytes()
    except FileNotFoundError:
        return None
    snapshot: Snapshot = adapter(Snapshot).validate_json(text)
    if snapshot.schema > SCHEMA:
        raise ValueError(f"{run_dir}: its metrics have schema {snapshot.schema}, this torchspec reads {SCHEMA}")
    reports = tuple(w.report for w in snapshot.workers if w.alive)
    measured = read_series(RunFolder(run_dir).evaluations)
    return replace(
        snapshot,
        status=replace(snapshot.status, workers=reports),
        measured_accept_length=measured[-1]["accept_length"] if measured else None,
    )
