"""Where the time of one training rank goes: counters, the thread that tells the controller, a profile of some steps.

The step loop's own parts (waiting, pausing, optimizer) are host times. Forward and backward are device times: on CUDA
they lie between events, which are read after the step's one wait for the device, so measuring adds no synchronisation;
on a CPU the host's clock says the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch.profiler import ProfilerActivity, profile

from torchspec.contracts import RankId, RankReport

Mark = float | torch.cuda.Event


class RankClock:
    """Counters of a rank. :meth:`report` may be called from another thread."""

    def __init__(self, rank: int, device: torch.device, peak_flops: float | None):
        self._cuda = device.type == "cuda"
        self._counts = RankReport(rank, peak_flops=peak_flops)
        self._began = self._since = time.perf_counter()
        self._lock = threading.Lock()
        """Counters and times are of one moment, whoever reads them."""
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}

    @contextmanager
    def doing(self, what: Literal["waiting", "paused"]) -> Iterator[None]:
        """Around what is not training."""
        self._do(what)
        try:
            yield
        finally:
            self._do("training")

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Around work for the device; see :meth:`device_seconds`."""
        start = self._mark()
        yield
        self._spans.setdefault(name, []).append((start, self._mark()))

    def device_seconds(self, name: str) -> float:
        """Of all spans of this name since the last call. Only after the host has waited for the device."""
        return sum(_seconds(start, end) for start, end in self._spans.pop(name, []))

    def step_made(self, step: int, **more: float) -> None:
        """Add a step's parts and the like to the counters."""
        more["steps"] = 1
        with self._lock:
            counts = self._counts
            self._counts = replace(counts, step=step, **{k: getattr(counts, k) + v for k, v in more.items()})

    def report(self) -> RankReport:
        """The counters now, with the wait or the pause that goes on."""
        with self._lock:
            now = time.perf_counter()
            return replace(_with_open_part(self._counts, now - self._since), seconds=now - self._began)

    def _do(self, what: Literal["waiting", "training", "paused"]) -> None:
        with self._lock:
            now = time.perf_counter()
            self._counts = replace(_with_open_part(self._counts, now - self._since), doing=what)
            self._since = now

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _with_open_part(counts: RankReport, seconds: float) -> RankReport:
    """With the wait or the pause that has gone on for ``seconds``."""
    if counts.doing == "waiting":
        return replace(counts, wait_seconds=counts.wait_seconds + seconds)
    if counts.doing == "paused":
        return replace(counts, pause_seconds=counts.pause_seconds + seconds)
    return counts


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1000


@contextmanager
def reporting(
    controller: Any, rank: RankId, report: Callable[[], RankReport], interval: float
) -> Iterator[Callable[[], None]]:
    """Send ``report()`` to the controller each ``interval`` seconds, at the end, and when what this yields is called.

    Never if ``interval`` is 0.

    A thread of its own, because the step loop is away for long and a rank that waits has something to say, too.
    """
    if not interval:
        yield lambda: None
        return
    ended = threading.Event()

    def tell() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # a controller that is away will be back, or ends the run
            ray.get(controller.rank_report.remote(rank, report()), timeout=10)

    def loop() -> None:
        while not ended.wait(interval):
            tell()

    thread = threading.Thread(target=loop, name="report", daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        ended.set()
        thread.join()
        tell()


class StepProfiler:
    """Steps ``first`` to ``last`` under torch's profiler, as a chrome trace for Perfetto or TensorBoard.

    Args:
        steps: first and last, or None for no profile.
        path: the trace, gzipped.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path, device: torch.device):
        self._steps, self._path = steps, path
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """A step begins. A run that resumes inside the window profiles the rest of it."""
        if self._steps is not None and self._profile is None and self._steps[0] <= step <= self._steps[1]:
            self._profile = profile(activities=self._activities, record_shapes=True, acc_events=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """A step has been made."""
        if self._profile is not None and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what there is; the run may end inside the window."""
        if self._profile is not None:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
            self._steps = None
