"""Weights & Biases (the extra ``wandb``). Its own settings (WANDB_MODE, WANDB_API_KEY, ...) say where it sends to."""

from __future__ import annotations

import secrets
from pathlib import Path

import yaml

from torchspec.contracts import RunStatus, StepReport
from torchspec.monitor.trackers.scalars import report_scalars, status_scalars
from torchspec.run_folder import RunFolder


class WandbTracker:
    """One W&B run for a run of ours, resumes included.

    W&B's own step counter must not go back, which a resume does: figures are plotted over ``step`` instead.
    """

    def __init__(self, run_dir: Path, project: str):
        import wandb

        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=_kept(run_dir / "wandb_id"),
            resume="allow",
            dir=str(run_dir),
            config=yaml.safe_load(RunFolder(run_dir).config.read_text()),
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is the run's own
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, report: StepReport) -> None:
        self._run.log({**report_scalars(report), "step": report.step})

    def status(self, status: RunStatus) -> None:
        self._run.log({**status_scalars(status), "step": status.step})

    def close(self) -> None:
        self._run.finish()


def _kept(path: Path) -> str:
    """A random id, the same each time."""
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
