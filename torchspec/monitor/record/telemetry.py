"""Puts the reports of workers and ranks together to a :class:`Snapshot`.

Counters of a report only ever grow while its sender lives; the totals over a pool are sums of increases, so they go
on when a worker is replaced or the trainer starts again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torchspec.contracts import RankReport, RunStatus, WorkerReport
from torchspec.instruments import FEWEST_STEPS, WINDOW_SECONDS, percentile, since
from torchspec.monitor.snapshot import (
    RANK_PARTS,
    SILENT_SECONDS,
    HistoryPoint,
    RankState,
    Snapshot,
    WorkerDoing,
    WorkerState,
)

GONE_KEPT = 16
"""How many workers that are no more stay visible."""
LONGEST_SECONDS = 600.0
"""Steps that take longer than a quarter of this are told of by fewer than :data:`FEWEST_STEPS`."""

Report = TypeVar("Report", WorkerReport, RankReport)

WORKER_TOTALS = {
    "answer_tokens": "answer_tokens",
    "put_bytes": "put_bytes",
    "put_seconds": "put_seconds",
    "seconds": "worker_seconds",
    "busy_seconds": "worker_busy_seconds",
    "engine_seconds": "worker_engine_seconds",
}
RANK_TOTALS = {
    "get_bytes": "get_bytes",
    "get_seconds": "get_seconds",
    "seconds": "rank_seconds",
    **{f"{part}_seconds": f"rank_{part}_seconds" for part in RANK_PARTS},
}
"""Field of a report to the counter of :class:`HistoryPoint` that sums it up."""


@dataclass
class ReportWindow:
    """What one sender has reported lately: pairs of time and report, oldest first."""

    started: float
    heard: float
    reports: deque[tuple[float, Any]] = field(default_factory=deque)
    of_steps: bool = False
    """It is a rank's, whose counters grow once a step: fewer than :data:`FEWEST_STEPS` say little."""
    end: Literal["gone", "ended"] | None = None
    """How it came to be no more."""

    def add(self, now: float, report: Any) -> None:
        self.heard = now
        self.reports.append((now, report))
        while len(self.reports) > 2 and self._enough(now, *self.reports[1]):
            self.reports.popleft()

    def _enough(self, now: float, since: float, report: Any) -> bool:
        """Whether what came after this report is enough to tell by."""
        if self.of_steps and since > now - LONGEST_SECONDS and self.latest.steps - report.steps < FEWEST_STEPS:
            return False
        return since < now - WINDOW_SECONDS

    @property
    def latest(self) -> Any:
        return self.reports[-1][1]

    def doing(self, now: float) -> WorkerDoing:
        """What a worker does."""
        if self.end is not None:
            return self.end
        if not self.reports:
            return "starting"
        if now - self.heard > SILENT_SECONDS:
            return "silent"
        return "working" if self.latest.leases else "waiting"

    def growth(self, name: str, by: str = "seconds") -> float:
        """How much a counter has grown over the window, for each that another one has; 0 where that has not."""
        earliest = self.reports[0][1]
        grown, other = (getattr(self.latest, n) - getattr(earliest, n) for n in (name, by))
        return grown / other if other > 0 else 0.0

    def percentile(self, histogram: str, share: float) -> float | None:
        """Of the latencies that came within the window."""
        return percentile(since(getattr(self.latest, histogram), getattr(self.reports[0][1], histogram)), share)


class Blocked:
    """Adds up how long something stood in the way."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._total = clock, 0.0
        self._since: float | None = None

    def set(self, blocked: bool) -> None:
        now = self._clock()
        if self._since is not None:
            self._total += now - self._since
        self._since = now if blocked else None

    @property
    def seconds(self) -> float:
        return self._total + (self._clock() - self._since if self._since is not None else 0.0)


class Telemetry:
    """Reports in, snapshots out; ``clock`` in seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self.totals: Counter[str] = Counter()
        """Counters of :class:`HistoryPoint`, by name."""
        self.credit_blocked, self.window_blocked = Blocked(clock), Blocked(clock)
        self._workers: dict[str, ReportWindow] = {}
        self._ranks: dict[int, ReportWindow] = {}

    # ---- what is told ----

    def worker_started(self, name: str) -> None:
        now = self._clock()
        self._workers[name] = ReportWindow(now, now)

    def worker_gone(self, name: str, end: Literal["gone", "ended"]) -> None:
        """A worker is no more: it died, or has ended in good order."""
        if name in self._workers:
            self._workers[name].end = end
        gone = [name for name, window in self._workers.items() if window.end]
        for name in gone[:-GONE_KEPT]:
            del self._workers[name]

    def is_gone(self, name: str) -> bool:
        return name in self._workers and self._workers[name].end is not None

    def worker_report(self, report: WorkerReport) -> bool:
        """Whether it is this worker's first."""
        known = report.worker in self._workers
        if not known:  # it was at work before this controller
            self.worker_started(report.worker)
        window = self._workers[report.worker]
        first = known and not window.reports
        self._add(window, WorkerReport(report.worker) if known else report, report, WORKER_TOTALS)
        return first

    def rank_report(self, report: RankReport) -> None:
        now = self._clock()
        window = self._ranks.get(report.rank)
        if window is None or report.seconds < window.latest.seconds:  # another process has taken its place
            window = self._ranks[report.rank] = ReportWindow(now, now, of_steps=True)
        self._add(window, RankReport(report.rank), report, RANK_TOTALS)

    @property
    def pausing(self) -> bool:
        """Whether ranks evaluate or save."""
        return any(window.latest.doing == "paused" for window in self._ranks.values())

    def ranks_gone(self) -> None:
        """The trainer has ended, or starts again with another number of ranks."""
        self._ranks.clear()

    def _add(self, window: ReportWindow, zero: Report, report: Report, totals: dict[str, str]) -> None:
        before = window.latest if window.reports else zero
        for name, total in totals.items():
            self.totals[total] += max(0, getattr(report, name) - getattr(before, name))
        window.add(self._clock(), report)

    # ---- what is made of it ----

    def snapshot(self, status: RunStatus) -> Snapshot:
        now = self._clock()
        workers = tuple(self._worker(name, now) for name in sorted(self._workers, key=_natural))
        ranks = tuple(self._rank(rank) for rank in sorted(self._ranks))
        alive = [w for w in workers if w.alive]
        point = HistoryPoint(
            time=now,
            phase=status.phase,
            step=status.step,
            samples=status.samples,
            queue_depth=status.queue_depth,
            store_bytes=status.store_bytes,
            store_capacity_bytes=status.store_capacity,
            credit_bytes=status.credit_bytes,
            workers=len(alive),
            workers_waiting=sum(w.doing == "waiting" for w in alive),
            ranks=len(ranks),
            ranks_waiting=sum(r.report.doing == "waiting" for r in ranks),
            credit_blocked_seconds=self.credit_blocked.seconds,
            window_blocked_seconds=self.window_blocked.seconds,
            **self.totals,
        )
        return Snapshot(status, point, workers, ranks)

    def _worker(self, name: str, now: float) -> WorkerState:
        window = self._workers[name]
        if not window.reports:
            return WorkerState(name, window.doing(now), window.started, window.heard, WorkerReport(name))
        return WorkerState(
            name=name,
            doing=window.doing(now),
            since=window.started,
            heard=window.heard,
            report=window.latest,
            samples_per_s=window.growth("samples"),
            tokens_per_s=window.growth("tokens"),
            put_bytes_per_s=window.growth("put_bytes", by="put_seconds"),
            put_p50_seconds=window.percentile("put_histogram", 0.5),
            put_p99_seconds=window.percentile("put_histogram", 0.99),
            wait_share=window.growth("seconds") - window.growth("busy_seconds"),  # of 1, or of 0 before a second report
        )

    def _rank(self, rank: int) -> RankState:
        window = self._ranks[rank]
        peak_flops = window.latest.peak_flops
        return RankState(
            rank=rank,
            heard=window.heard,
            report=window.latest,
            tokens_per_s=window.growth("tokens"),
            step_seconds=window.growth("seconds", by="steps") or None,
            get_bytes_per_s=window.growth("get_bytes", by="get_seconds"),
            get_p50_seconds=window.percentile("get_histogram", 0.5),
            get_p99_seconds=window.percentile("get_histogram", 0.99),
            mfu=window.growth("flops") / peak_flops if peak_flops else None,
            **{f"{part}_share": window.growth(f"{part}_seconds") for part in RANK_PARTS},
        )


def _natural(name: str) -> tuple[str, int]:
    """Sorts ``worker-10`` after ``worker-9``."""
    head, _, number = name.rpartition("-")
    return head, int(number) if number.isdigit() else 0
