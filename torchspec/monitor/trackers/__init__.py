"""Trackers: where a run's figures go besides its own ``metrics.jsonl``.

A tracker is told of every step and of the run's status; another one is one more module with a kind of
:class:`Tracker` and a line in :data:`TRACKERS`. A tracker's package is imported only when it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport

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
    """All trackers of a run. One that fails is left out from then on, which ``warn`` is told; the run goes on."""

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
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"monitor.trackers names {name}, whose package is not installed: pip install 'torchspec[{name}]', or "
                f"take {name} out of the list"
            )


def open_trackers(config: MonitorConfig, run_dir: Path, warn: Callable[[str], None]) -> Trackers:
    """The trackers that ``config`` asks for, writing under ``run_dir``."""
    opened = []
    for name in config.trackers:
        kind = getattr(importlib.import_module(f"torchspec.monitor.trackers.{name}"), TRACKERS[name])
        opened.append(kind(run_dir, config.project))
    return Trackers(opened, warn)


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
