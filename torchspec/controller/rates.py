"""A rate over the last while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 30.0
FEWEST_STEPS = 4
"""Where fewer pieces than this come within the window, it is as long as they take."""


class Rate:
    """Samples and tokens a second over the last :data:`WINDOW_SECONDS`, or :data:`FEWEST_STEPS` pieces of work.

    From piece to piece, so that neither the time before the first one nor the beginning of the next one counts; when
    the next one is overdue, that time counts, too, and the rate falls.

    Args:
        clock: in seconds.
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
