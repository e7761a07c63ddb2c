"""What processes measure themselves with: how long something goes on, how long each of many takes, how many a second.

Standard library only, so that who reads the figures needs nothing more.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of latencies in a histogram, in seconds."""

Histogram = tuple[int, ...]
"""Latencies: counts, one for each bound and one for what took longer than the last. Cheap to keep, to add up over
workers, to subtract over time."""
EMPTY: Histogram = (0,) * (len(BOUNDS) + 1)

WINDOW_SECONDS = 30.0
FEWEST_STEPS = 4
"""Where fewer pieces than this come within the window, it is as long as they take."""


class Stopwatch:
    """Adds up the time during which at least one of something is under way: enter and exit it around each."""

    def __init__(self) -> None:
        self.count = 0
        self._total = self._since = 0.0

    def __enter__(self) -> None:
        if self.count == 0:
            self._since = time.perf_counter()
        self.count += 1

    def __exit__(self, *_error: object) -> None:
        self.count -= 1
        if self.count == 0:
            self._total += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """So far, what goes on now included."""
        return self._total + (time.perf_counter() - self._since if self.count else 0.0)


def observe(histogram: Histogram, seconds: float) -> Histogram:
    """``histogram`` with one latency more."""
    slot = bisect_left(BOUNDS, seconds)
    return (*histogram[:slot], histogram[slot] + 1, *histogram[slot + 1 :])


def since(now: Sequence[int], before: Sequence[int]) -> Histogram:
    """What came in between two readings of one histogram."""
    return tuple(a - b for a, b in zip(now, before, strict=True))


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Seconds that ``share`` of the latencies did not exceed, linear between bounds; None where there are none.

    What took longer than the last bound counts as that bound.
    """
    total = sum(histogram)
    if not total:
        return None
    wanted = share * total
    seen = list(accumulate(histogram))
    slot = next(i for i, count in enumerate(seen) if count >= wanted and histogram[i])
    if slot == len(BOUNDS):
        return BOUNDS[-1]
    low = BOUNDS[slot - 1] if slot else 0.0
    return low + (BOUNDS[slot] - low) * (wanted - (seen[slot] - histogram[slot])) / histogram[slot]


class Rate:
    """Samples and tokens a second over the last :data:`WINDOW_SECONDS`, or :data:`FEWEST_STEPS` pieces of work.

    From piece to piece, so that neither the time before the first one nor the beginning of the next one counts; when
    the next one is overdue, that time counts, too, and the rate falls. ``clock`` counts seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pieces: deque[tuple[float, int, int]] = deque()

    def add(self, samples: int, tokens: int) -> None:
        """A piece of work is done."""
        self._pieces.append((self._clock(), samples, tokens))
        self._trim()

    @property
    def samples_per_s(self) -> float:
        return self._per_second(1)

    @property
    def tokens_per_s(self) -> float:
        return self._per_second(2)

    def _per_second(self, column: int) -> float:
        self._trim()
        if len(self._pieces) < 2:
            return 0.0
        first, last = self._pieces[0][0], self._pieces[-1][0]
        due = (last - first) / (len(self._pieces) - 1)
        seconds = max(last, self._clock() - due) - first
        done = sum(piece[column] for piece in self._pieces) - self._pieces[0][column]
        return done / max(seconds, 1.0)  # pieces that come all at once, as samples do, say nothing of a second

    def _trim(self) -> None:
        oldest = self._clock() - WINDOW_SECONDS
        while len(self._pieces) > FEWEST_STEPS + 1 and self._pieces[0][0] < oldest:
            self._pieces.popleft()
