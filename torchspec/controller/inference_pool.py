"""How many inference workers there are, and how many there should be: a number, or what training needs and no more.

Two shares of time, measured over a window, say which pool waits for the other:

    starvation     training waits for samples          -> with n workers it has (1 - starvation) of what it could train
    backpressure   workers wait for credits or window  -> (1 - backpressure) of n would do

The gap between the two thresholds is the hysteresis; after each move nothing is decided until the pool has had the new
size for a while, because a new engine loads its model first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torchspec.config.schema import Config
from torchspec.controller.sync import Signal

STARVED = 0.1
"""Training waits for more than this share of the time: too few workers."""
FED = 0.02
"""It waits for less than this share: maybe too many."""
SPARE = 0.15
"""Share of the remaining workers' time that must be left over after one has gone."""
COOL_DOWN_SECONDS = 30.0
FEWEST_OBSERVATIONS, MOST_OBSERVATIONS = 20, 120
FEWEST_STEPS = 2


@dataclass(frozen=True, slots=True)
class Move:
    """A new size, and why."""

    workers: int
    reason: str

    def __str__(self) -> str:
        return f"inference workers: {self.workers}, because {self.reason}"


class InferencePool:
    """The workers that there are, and how many there should be.

    Args:
        running: workers that are at work already, when the controller starts anew beside them.
    """

    def __init__(self, config: Config, running: int, clock: Callable[[], float] = time.monotonic):
        inference = config.inference
        self.auto = inference.workers == "auto"
        self._least, self._most = inference.min_workers, inference.max_workers
        self.wanted = inference.first_workers
        if self.auto and running:
            self.wanted = self._within_limits(running)
        self.changed = Signal()
        self._clock = clock
        self._active: set[str] = set()
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        self._stretch: list[tuple[float, float]] = []  # starvation and backpressure
        self._stretch_from = 0  # the step
        self._settled_at = clock()

    def ask_for(self, workers: int | Literal["auto"]) -> None:
        """Have so many workers from now on; ``auto`` begins with as many as there should be now."""
        self.auto = workers == "auto"
        self._resize(self._within_limits(self.wanted) if workers == "auto" else workers)

    def give_up(self) -> int:
        """Have one worker fewer from now on; the size then."""
        self._resize(self.wanted - 1)
        return self.wanted

    def joined(self, worker: str) -> None:
        """``worker`` asks for leases. One that has left is no part of the pool any more, whatever call comes late."""
        if worker not in self._active and worker not in self._gone:
            self._active.add(worker)
            self._settled_at = self._clock()

    def drain(self, worker: str) -> None:
        """``worker`` gets no more leases."""
        self._active.discard(worker)
        self._gone.add(worker)
        self._settled_at = self._clock()

    def has_left(self, worker: str) -> bool:
        """Whether ``worker`` gets no more leases."""
        return worker in self._gone

    @contextmanager
    def waiting(self, worker: str) -> Iterator[None]:
        """While ``worker`` waits for a lease."""
        self._waiting.add(worker)
        try:
            yield
        finally:
            self._waiting.discard(worker)

    def observe(self, starved: bool, busy: Callable[[str], bool]) -> None:
        """Note how things are now.

        Args:
            starved: training waits for samples.
            busy: whether a worker holds leases.
        """
        idle = sum(not busy(worker) for worker in self._waiting & self._active)
        self._stretch.append((float(starved), idle / max(1, len(self._active))))

    def autoscale(self, step: int) -> Move | None:
        """Think about what was seen since the last time, if that was enough, and move if that is called for.

        Args:
            step: the last one that was made. A stretch of less than :data:`FEWEST_STEPS` looks like waiting or like
                none, as it happens.
        """
        if len(self._stretch) < FEWEST_OBSERVATIONS:
            return None
        if step - self._stretch_from < FEWEST_STEPS and len(self._stretch) < MOST_OBSERVATIONS:
            return None
        starvation, backpressure = (sum(column) / len(self._stretch) for column in zip(*self._stretch, strict=True))
        self.begin_stretch(step)
        settled = len(self._active) == self.wanted and self._clock() >= self._settled_at + COOL_DOWN_SECONDS
        move = decide(self.wanted, starvation, backpressure, self._least, self._most) if self.auto and settled else None
        if move is not None:
            self._resize(move.workers)
        return move

    def begin_stretch(self, step: int) -> None:
        """Begin a new stretch after ``step``."""
        self._stretch.clear()
        self._stretch_from = step

    def _within_limits(self, workers: int) -> int:
        return min(max(workers, self._least), self._most)

    def _resize(self, workers: int) -> None:
        self.wanted, self._settled_at = workers, self._clock()
        self.changed.fire()


def decide(n: int, starvation: float, backpressure: float, least: int, most: int) -> Move | None:
    """What a pool of ``n`` workers, all at work through the window, should become; None to stay as it is.

    Growing aims at the size that would feed the trainers if production grows with the workers, at most twice the
    present one; shrinking goes one at a time.
    """
    if starvation > STARVED and starvation > backpressure:
        needed = math.ceil(n / max(0.5, 1 - starvation))
        workers = min(max(n + 1, needed), most)
        if workers > n:
            return Move(workers, f"training waits for samples {starvation:.0%} of the time")
    elif starvation < FED and n * (1 - backpressure) <= (n - 1) * (1 - SPARE) and n > least:
        return Move(n - 1, f"workers wait for room {backpressure:.0%} of the time, and training for none")
    return None
