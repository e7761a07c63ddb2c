"""MLflow (the extra ``mlflow``). MLFLOW_TRACKING_URI says where it sends to; default: a file in the run's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torchspec.monitor.trackers import Tracker


class MlflowTracker(Tracker):
    """One MLflow run for a run of ours, resumes included."""

    def __init__(self, run_dir: Path, project: str):
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        path = run_dir / "mlflow_run"
        if not path.exists():
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            path.write_text(self._client.create_run(number, run_name=run_dir.name).info.run_id)
        self._run_id = path.read_text()
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(self._run_id, [Metric(tag, value, now, step) for tag, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
