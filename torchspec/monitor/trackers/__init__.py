"""Trackers: where a run's figures go besides its own ``metrics.jsonl``.

A tracker is told of every step and of the run's status; another one is one more module with the three methods of
:class:`Tracker` and a line in :data:`TRACKERS`. A tracker's package is imported only when it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport

TRACKERS = {
    "tensorboard": ("tensorboard", "TensorBoardTracker"),
    "wandb": ("wandb", "WandbTracker"),
    "mlflow": ("mlflow", "MlflowTracker"),
}
"""Name in ``monitor.trackers`` to the package it needs, which is its module here, too, and to its class."""


class Tracker(Protocol):
    def step(self, report: StepReport) -> None:
        """An optimizer step, or a held-out evaluation."""

    def status(self, status: RunStatus) -> None:
        """How the run is doing; once for each batch of steps."""

    def close(self) -> None:
        """Everything is on disk, or sent, when this returns."""


class Trackers:
    """All trackers of a run behind one object. One that fails is left out from then on; the run goes on.

    Args:
        warn: told, in one line, of a tracker that failed.
    """

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]):
        self._trackers, self._warn = list(trackers), warn
        self.steps_seen = 0
        """Reports taken so far: the number to ask the controller for what comes after."""

    def log(self, status: RunStatus, reports: Sequence[StepReport]) -> None:
        """Pass on new reports, and with them the status; a status without a new report tells no tracker anything."""
        self.steps_seen += len(reports)

        def pass_on(tracker: Tracker) -> None:
            for report in reports:
                tracker.step(report)
            tracker.status(status)

        if reports:
            self._all(pass_on)

    def close(self) -> None:
        self._all(lambda tracker: tracker.close())

    def _all(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # whatever a service or its package comes up with
                self._trackers.remove(tracker)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._warn(f"{type(tracker).__name__} failed and is left out from here on: {reason}")


def check_trackers(config: MonitorConfig) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        ValueError: names the extra to install.
    """
    for name in config.trackers:
        package, _ = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"monitor.trackers names {name}, whose package is not installed: pip install 'torchspec[{name}]', or "
                f"take {name} out of the list"
            )


def open_trackers(config: MonitorConfig, run_dir: Path, warn: Callable[[str], None]) -> Trackers:
    """The trackers that ``config`` asks for, writing under ``run_dir``."""
    opened = []
    for name in config.trackers:
        module, class_name = TRACKERS[name]
        kind = getattr(importlib.import_module(f"torchspec.monitor.trackers.{module}"), class_name)
        opened.append(kind(run_dir, config.project))
    return Trackers(opened, warn)
