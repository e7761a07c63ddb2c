"""A running run seen from another process: ``torchspec status``, ``scale`` and ``stop``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import ray

from torchspec.contracts import RunStatus
from torchspec.driver.cluster import loopback_stays, set_auth_mode
from torchspec.driver.supervise import root_cause
from torchspec.network import LOOPBACK
from torchspec.run_folder import RunFolder


class RunHandle:
    """Talks to a run's controller."""

    def __init__(self, controller: Any):
        self._controller = controller

    def status(self) -> RunStatus:
        return self._ask("status")

    def scale_inference(self, workers: int | Literal["auto"]) -> None:
        """Have so many inference workers."""
        self._ask("scale_inference", workers)

    def scale_training(self, sizes: dict[str, int | str]) -> None:
        """Go on training with these sizes, from a checkpoint that is made at once."""
        self._ask("scale_training", sizes)

    def stop(self, reason: str = "asked by torchspec stop") -> None:
        """Ask for an orderly stop: the current steps end, a checkpoint is saved, the driver cleans up."""
        self._ask("request_stop", reason)

    def _ask(self, method: str, *args: Any) -> Any:
        """Raises ValueError: the controller could not do it, or is just being restarted."""
        try:
            return ray.get(getattr(self._controller, method).remote(*args))
        except ray.exceptions.RayError as error:
            raise ValueError(f"the run's controller: {root_cause(error)}; try again in a moment") from None


class PageControls:
    """What a page may do to the run in ``run_dir``; it connects for each action, if it has no ``controller`` yet."""

    def __init__(self, run_dir: Path, controller: Any = None):
        self._run_dir, self._controller = run_dir, controller

    def scale_inference(self, workers: int | Literal["auto"]) -> None:
        """Raises ValueError: the machine cannot have so many, or the run does not answer."""
        from torchspec.driver.scale import checked_change

        with self._handle() as handle:
            change = checked_change(self._run_dir, str(workers))
            assert change.workers is not None
            handle.scale_inference(change.workers)

    def stop(self, reason: str) -> None:
        """Raises ValueError: the run does not answer."""
        with self._handle() as handle:
            handle.stop(reason)

    def _handle(self) -> AbstractContextManager[RunHandle]:
        return connect(self._run_dir) if self._controller is None else nullcontext(RunHandle(self._controller))


@contextmanager
def connect(run_dir: Path) -> Iterator[RunHandle]:
    """Connect to the run in ``run_dir``. Raises ValueError: there is none, or it is not running now."""
    run = RunFolder(run_dir)
    if not run.exists():
        raise ValueError(f"{run_dir} is not the folder of a run (it has no config.yaml)")
    if not run.is_live():
        raise ValueError(f"{run_dir} is not running now; continue it with: torchspec resume {run_dir}")
    handle = run.read_handle()
    set_auth_mode(handle["auth_mode"])
    try:
        with loopback_stays() if handle["address"].startswith(LOOPBACK) else nullcontext():
            ray.init(
                address=handle["address"],
                namespace=handle["namespace"],
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        controller = ray.get_actor("controller")
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ValueError(f"{run_dir} does not answer: {' '.join(str(error).split())[:200]}") from None
    try:
        yield RunHandle(controller)
    finally:
        ray.shutdown()
