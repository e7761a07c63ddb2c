"""A running run seen from another process: ``torchspec status`` and ``torchspec stop``."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from torchspec.contracts import RunStatus


class RunHandle:
    """Talks to a run's controller."""

    def __init__(self, controller: Any):
        self._controller = controller

    def status(self) -> RunStatus:
        return ray.get(self._controller.status.remote())

    def stop(self, reason: str = "asked by torchspec stop") -> None:
        """Ask for an orderly stop: the current steps end, a checkpoint is saved, the driver cleans up."""
        ray.get(self._controller.request_stop.remote(reason))


@contextmanager
def connect(run_dir: Path) -> Iterator[RunHandle]:
    """Connect to the run whose folder is ``run_dir``.

    Raises:
        ValueError: there is no such run, or it is not running now.
    """
    if not (run_dir / "config.yaml").exists():
        raise ValueError(f"{run_dir} is not the folder of a run (it has no config.yaml)")
    path = run_dir / "handle.json"
    handle = json.loads(path.read_text()) if path.exists() else None
    if handle is None or (handle["host"] == socket.gethostname() and not Path(f"/proc/{handle['pid']}").exists()):
        raise ValueError(f"{run_dir} is not running now; continue it with: torchspec resume {run_dir}")
    try:
        ray.init(
            address=handle["address"], namespace=handle["namespace"], log_to_driver=False, logging_level=logging.ERROR
        )
        controller = ray.get_actor("controller")
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ValueError(f"{run_dir} does not answer: {' '.join(str(error).split())[:200]}") from None
    try:
        yield RunHandle(controller)
    finally:
        ray.shutdown()
