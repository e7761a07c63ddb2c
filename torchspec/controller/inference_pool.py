"""What size the two pools should have: what was asked for, kept in the run's ``config.yaml`` before it is acted on.

So whatever dies in the middle of a change, the next one to read the file goes on with it: a restarted controller, and
``torchspec resume``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torchspec.config.load import parse_config
from torchspec.config.schema import Config
from torchspec.controller.autoscale import COOL_DOWN_SECONDS, Limits, Load, Move, decide
from torchspec.controller.sync import Signal

SIZES = ("dp_size", "attention_backend", "sp_ulysses_size", "sp_ring_size")
"""Knobs of ``training`` that can change while a run goes on."""


FEWEST_LOOKS, MOST_LOOKS = 20, 120
FEWEST_STEPS = 2


class InferencePool:
    """The workers that there are, and how many there should be.

    Args:
        running: workers that are at work already, when the controller starts anew beside them.
    """

    def __init__(self, config: Config, running: int, clock: Callable[[], float] = time.monotonic):
        inference = config.inference
        self.auto = inference.workers == "auto"
        self.limits = Limits(inference.min_workers, inference.max_workers)
        self.wanted = inference.first_workers
        if self.auto and running:
            self.wanted = self._within_limits(running)
        self.changed = Signal()
        self._clock = clock
        self._active: set[str] = set()
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        self._looks: list[tuple[float, float]] = []  # starvation and backpressure
        self._looking_since = 0  # the step
        self._settled_at = clock()

    def ask_for(self, workers: int | Literal["auto"]) -> None:
        """Have so many workers from now on; ``auto`` begins with as many as there should be now."""
        self.auto = workers == "auto"
        self._resize(self._within_limits(self.wanted) if workers == "auto" else workers)

    def joined(self, worker: str) -> None:
        """``worker`` asks for leases."""
        if worker not in self._active:
            self._active.add(worker)
            self._settled_at = self._clock()

    def drain(self, worker: str) -> None:
        """``worker`` gets no more leases."""
        self._active.discard(worker)
        self._gone.add(worker)
        self._settled_at = self._clock()

    left = drain

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

    def look(self, starved: bool, busy: Callable[[str], bool]) -> None:
        """Note how things are now.

        Args:
            starved: training waits for samples.
            busy: whether a worker has leases in hand.
        """
        idle = sum(not busy(worker) for worker in self._waiting & self._active)
        self._looks.append((float(starved), idle / max(1, len(self._active))))

    def autoscale(self, step: int) -> Move | None:
        """Think about what was seen since the last time, if that was enough, and move if that is called for.

        Args:
            step: the last one that was made. A stretch of less than :data:`FEWEST_STEPS` looks like waiting or like
                none, as it happens.
        """
        if len(self._looks) < FEWEST_LOOKS:
            return None
        if step - self._looking_since < FEWEST_STEPS and len(self._looks) < MOST_LOOKS:
            return None
        starvation, backpressure = (sum(column) / len(self._looks) for column in zip(*self._looks, strict=True))
        self.forget_looks(step)
        load = Load(len(self._active), starvation, backpressure)
        settled = load.workers == self.wanted and self._clock() >= self._settled_at + COOL_DOWN_SECONDS
        move = decide(load, self.limits) if self.auto and settled else None
        if move is not None:
            self._resize(move.workers)
        return move

    def forget_looks(self, step: int) -> None:
        """Begin a new stretch after ``step``."""
        self._looks.clear()
        self._looking_since = step

    def _within_limits(self, workers: int) -> int:
        return min(max(workers, self.limits.least), self.limits.most)

    def _resize(self, workers: int) -> None:
        self.wanted, self._settled_at = workers, self._clock()
        self.changed.fire()


def with_sizes(config: Config, sizes: Mapping[str, int | str]) -> Config:
    """``config`` with other sizes of the training group (:data:`SIZES`).

    Raises:
        ValueError: they do not fit the rest of it.
    """
    assert set(sizes) <= set(SIZES)
    tree = config.model_dump()
    return parse_config(tree | {"training": tree["training"] | sizes})


def with_workers(config: Config, workers: int | Literal["auto"]) -> Config:
    """``config`` with so many inference workers.

    Raises:
        ValueError: so many there cannot be.
    """
    tree = config.model_dump()
    return parse_config(tree | {"inference": tree["inference"] | {"workers": workers}})
