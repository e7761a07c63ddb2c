"""Weights & Biases (the extra ``wandb``). Its own settings (WANDB_MODE, WANDB_API_KEY, ...) say where it sends to."""

from __future__ import annotations

import secrets
from pathlib import Path

import yaml

from torchspec.monitor.trackers import Tracker
from torchspec.run_folder import RunFolder


class WandbTracker(Tracker):
    """One W&B run for a run of ours, resumes included.

    W&B's own step counter must not go back, which a resume does: figures are plotted over ``step`` instead.
    """

    def __init__(self, run_dir: Path, project: str):
        import wandb

        path = run_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=path.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=yaml.safe_load(RunFolder(run_dir).config.read_text()),
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is the run's own
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()
