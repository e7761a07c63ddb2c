"""A window of steps under torch's profiler: one chrome trace a rank, for Perfetto or TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Profiles steps ``first`` to ``last``; nothing is imported or measured outside them.

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
