"""A rate over the last while."""

from __future__ import annotations

import time
from collections import deque

WINDOW_SECONDS = 30.0


class Rate:
    """Samples and tokens a second over the last :data:`WINDOW_SECONDS` (or since the first, if that is less)."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int, int]] = deque()
        self._start: float | None = None

    def add(self, samples: int, tokens: int) -> None:
        now = time.monotonic()
        self._start = self._start or now
        self._events.append((now, samples, tokens))
        self._trim(now)

    @property
    def samples_per_s(self) -> float:
        return self._per_second(1)

    @property
    def tokens_per_s(self) -> float:
        return self._per_second(2)

    def _per_second(self, column: int) -> float:
        now = time.monotonic()
        self._trim(now)
        if self._start is None or not self._events:
            return 0.0
        return sum(event[column] for event in self._events) / max(1.0, min(WINDOW_SECONDS, now - self._start))

    def _trim(self, now: float) -> None:
        while self._events and self._events[0][0] < now - WINDOW_SECONDS:
            self._events.popleft()
