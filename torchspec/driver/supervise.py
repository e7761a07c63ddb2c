"""Signs of life, and what follows when there are none: how often a part may start anew, and when the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

LONGEST_TURN = 2.0
"""Seconds that pass between two looks count up to here; of a longer gap, who knows who has slept."""


class AwakeClock:
    """Seconds that this process has been awake for. A suspended machine or a stopped session makes nobody look hung."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def elapsed(self) -> float:
        """Since the last call."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        return min(passed, LONGEST_TURN)


class Pulse:
    """Asks something for a sign of life again and again, and counts the seconds of silence.

    Args:
        ask: puts one question; the answer, or an error, comes with its future.
        patience: seconds of silence after which it is taken for hung.
        first: seconds until the first answer, while it starts; default: ``patience``.
    """

    def __init__(self, ask: Callable[[], Future[Any]], patience: float, first: float | None = None):
        self._ask, self._patience = ask, patience
        self._limit = patience if first is None else first
        self._question = ask()
        self._silence = 0.0
        self.answer: Any = None
        """The last one."""
        self.error: BaseException | None = None
        """What came instead of an answer the last time; None: an answer."""

    def hangs(self, elapsed: float) -> bool:
        """Whether it has been silent for too long, ``elapsed`` seconds after the last look."""
        self._silence += elapsed
        if self._question.done():
            self.error = self._question.exception()
            if self.error is None:
                self.answer = self._question.result()
                self._silence, self._limit = 0.0, self._patience
            self._question = self._ask()
        return self._silence >= self._limit


def actor_pulse(actor: Any, patience: float, first: float) -> Pulse:
    """Of an actor that has a ``ping``; ``first``: seconds until its first answer, while it starts."""
    return Pulse(lambda: actor.ping.remote().future(), patience, first)


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
        """Before a restart because of ``reason``, after ``step`` steps. Raises RunFailed: once too often."""
        self._fruitless = self._fruitless + 1 if step <= self._furthest else 1
        self._furthest = max(step, self._furthest)
        if self._fruitless > self._limit:
            raise RunFailed(f"{reason}; {self._limit} restarts (recovery.max_restarts) did not help")


def is_final(error: BaseException) -> bool:
    """Whether an actor that is started anew when it dies will not be, after what has come instead of an answer.

    A call that was under way when its process died fails with ActorDiedError, as one to an actor that is no more does,
    though another process is being started (Ray 2.60). Only a constructor that fails is the end.
    """
    return isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed


def root_cause(error: BaseException) -> str:
    """One line for a person: the remote exception itself, or how its process ended."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return " ".join(f"{type(cause).__name__}: {cause}".split())[:400]
    if is_final(error):  # Ray hands on its constructor's exception as text, a traceback
        return str(error).rstrip().splitlines()[-1][:400]
    return "its process ended" if isinstance(error, ray.exceptions.RayActorError) else type(error).__name__
