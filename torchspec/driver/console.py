"""What a run and a person tell each other: progress and messages one way, SIGINT (Ctrl-C) and SIGTERM the other.

The first signal stops a run with a checkpoint, the second at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from torchspec.contracts import RunStatus

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class View(Protocol):
    def status(self, status: RunStatus) -> None: ...
    def message(self, text: str) -> None: ...


class Interrupts:
    """Counts both signals between enter and exit: the second raises KeyboardInterrupt.

    Args:
        message: told what the first one does.
    """

    def __init__(self, message: Callable[[str], None]):
        self.count = 0
        self._message = message
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def __enter__(self) -> Interrupts:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take over the signals; again after ``ray.init``, which sets a handler that prints a stack and exits."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        self._message("interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once")


def new_messages(seen: list[str], now: tuple[str, ...]) -> list[str]:
    """What ``now``, a sliding window of recent messages, has after ``seen``, the same window earlier."""
    longest = min(len(seen), len(now))
    overlap = next(n for n in range(longest, -1, -1) if seen[len(seen) - n :] == list(now[:n]))
    return list(now[overlap:])
