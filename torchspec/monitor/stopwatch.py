"""Where the time of a process goes: clocks that others may read while they run. Standard library only."""

from __future__ import annotations

import time
from types import TracebackType


class Stopwatch:
    """Adds up the time during which at least one of something is under way: enter and exit it around each."""

    def __init__(self) -> None:
        self.count = 0
        self._total = self._since = 0.0

    def __enter__(self) -> None:
        if self.count == 0:
            self._since = time.perf_counter()
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.count -= 1
        if self.count == 0:
            self._total += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """So far, what goes on now included."""
        return self._total + (time.perf_counter() - self._since if self.count else 0.0)
