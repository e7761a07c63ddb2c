"""Trackers: where a run's figures go besides its own ``metrics.jsonl``.

A tracker is told of every step and of the run's status; another one is one more module with a kind of
:class:`Tracker` and a line in :data:`TRACKERS`. A tracker's package is imported only when it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchspec.call_thread import CallThread
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport

MOST_WAITING = 1000
"""Batches of reports that a tracker may be behind."""
CLOSE_SECONDS = 10.0
"""So long the end of a run waits for its trackers."""

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandbTracker", "mlflow": "MlflowTracker"}
"""Name in ``monitor.trackers``, of its package and of its module here, to its class: of (run_dir, project)."""


class Tracker(ABC):
    """Writes figures down, or sends them."""

    def step(self, report: StepReport) -> None:
        """An optimizer step, or a held-out evaluation."""
        self.log(report.step, _of_report(report))

    def status(self, status: RunStatus) -> None:
        """How the run is doing; once for each batch of steps."""
        self.log(status.step, _of_status(status))

    @abstractmethod
    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Figures by tag."""

    @abstractmethod
    def close(self) -> None:
        """Everything is on disk, or sent, when this returns."""


class Trackers:
    """All trackers of a run, each on a thread of its own, where it may fail, be slow or hang: the run goes on.

    One that fails is left out from then on, and one that cannot keep up misses steps; ``warn`` is told of both.

    Args:
        kinds: what opens each, by its name in ``monitor.trackers``.
    """

    def __init__(self, kinds: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]):
        self._threads = [TrackerThread(name, kind, warn) for name, kind in kinds.items()]
        self.steps_seen = 0
        """Reports taken so far: the number to ask the controller for what comes after."""

    def log(self, status: RunStatus, reports: Sequence[StepReport]) -> None:
        """Pass on new reports, and with them the status; a status without a new report tells no tracker anything."""
        self.steps_seen += len(reports)
        for thread in self._threads if reports else ():
            thread.log(status, reports)

    def close(self) -> None:
        """What the trackers have is on disk, or sent, when this returns; of one that is slow, not all."""
        for thread in self._threads:
            thread.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.wait(deadline)


class TrackerThread:
    """One tracker, which is opened here, too, and told everything in order."""

    def __init__(self, name: str, kind: Callable[[], Tracker], warn: Callable[[str], None]):
        self._name, self._warn, self._thread = name, warn, CallThread(name)
        self._tracker: Tracker | None = None
        self._failed, self._missed = False, 0
        self._thread.submit(self._try, self._open, kind)

    def log(self, status: RunStatus, reports: Sequence[StepReport]) -> None:
        if self._failed:
            return
        if self._thread.waiting >= MOST_WAITING:
            if not self._missed:
                self._warn(f"the tracker {self._name} does not keep up: it misses steps until it does")
            self._missed += len(reports)
        else:
            self._thread.submit(self._try, self._log, status, reports)

    def close(self) -> None:
        """Tell it that this is the end."""
        self._thread.submit(self._try, self._close)
        self._thread.close(0)

    def wait(self, deadline: float) -> None:
        """Until it has ended, or ``deadline``. What it has missed is said."""
        ended = self._thread.close(max(0.0, deadline - time.monotonic()))
        if not ended:
            self._warn(f"the tracker {self._name} has not taken all that it was told, and is not waited for any longer")
        if self._missed:
            self._warn(f"the tracker {self._name} has missed {self._missed:,} reports of steps")

    def _open(self, kind: Callable[[], Tracker]) -> None:
        self._tracker = kind()

    def _log(self, status: RunStatus, reports: Sequence[StepReport]) -> None:
        assert self._tracker is not None
        for report in reports:
            self._tracker.step(report)
        self._tracker.status(status)

    def _close(self) -> None:
        assert self._tracker is not None
        self._tracker.close()

    def _try(self, action: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            action(*args)
        except Exception as error:  # whatever a service or its package comes up with
            self._failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(f"the tracker {self._name} failed and is left out from here on: {reason}")


def check_trackers(config: MonitorConfig) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        ValueError: names the extra to install.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"monitor.trackers names {name}, whose package is not installed: pip install 'torchspec[{name}]', or "
                f"take {name} out of the list"
            )


def open_trackers(config: MonitorConfig, run_dir: Path, warn: Callable[[str], None]) -> Trackers:
    """The trackers that ``config`` asks for, writing under ``run_dir``."""

    def opening(name: str) -> Tracker:
        kind = getattr(importlib.import_module(f"torchspec.monitor.trackers.{name}"), TRACKERS[name])
        tracker: Tracker = kind(run_dir, config.project)
        return tracker

    return Trackers({name: partial(opening, name) for name in config.trackers}, warn)


def _of_report(report: StepReport) -> dict[str, float]:
    """Tag to value. Positions count from 1, the first token that the draft guesses."""
    split = report.split
    scalars = {f"{split}/loss": report.loss, f"{split}/accept_length": report.accept_length}
    for name, values in (("loss", report.loss_per_position), ("accuracy", report.full_accuracy)):
        scalars |= {f"{split}_position/{name}_{position}": value for position, value in enumerate(values, start=1)}
    if split == "train":
        scalars |= {
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/grad_norm": report.grad_norm,
            "step/tokens": report.tokens,
            "step/wait_seconds": report.wait_seconds,
            "step/fetch_seconds": report.fetch_seconds,
            "step/compute_seconds": report.compute_seconds,
            "step/optimizer_seconds": report.optimizer_seconds,
        }
    return scalars


def _of_status(status: RunStatus) -> dict[str, float]:
    """Tag to value: what flows between the two pools."""
    return {
        "pools/inference_tokens_per_s": status.inference_tokens_per_s,
        "pools/inference_samples_per_s": status.inference_samples_per_s,
        "pools/training_tokens_per_s": status.training_tokens_per_s,
        "pools/training_samples_per_s": status.training_samples_per_s,
        "pools/queue_depth": status.queue_depth,
        "pools/rejected": status.samples.get("rejected", 0),
        "store/bytes": status.store_bytes,
        "store/credit_bytes": status.credit_bytes,
    }
