"""What ends a run, and how often a part may be restarted before that."""

from __future__ import annotations

import ray


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


class Restarts:
    """Counts restarts that have led to nothing: since the last one, no step was made that had not been made before.

    Args:
        limit: ``recovery.max_restarts``.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._furthest, self._fruitless = 0, 0

    def count(self, step: int, reason: str) -> None:
        """Something is about to be restarted because of ``reason``, after ``step`` steps.

        Raises:
            RunFailed: once too often.
        """
        self._fruitless = self._fruitless + 1 if step <= self._furthest else 1
        self._furthest = max(step, self._furthest)
        if self._fruitless > self._limit:
            raise RunFailed(f"{reason}; {self._limit} restarts (recovery.max_restarts) did not help")


def root_cause(error: BaseException) -> str:
    """One line for a person: the remote exception itself, or how its process ended."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return " ".join(f"{type(cause).__name__}: {cause}".split())[:400]
    return "its process ended" if isinstance(error, ray.exceptions.RayActorError) else type(error).__name__
