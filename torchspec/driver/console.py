"""What a run and a person tell each other: progress and messages one way, signals the other.

The first SIGINT (Ctrl-C), SIGTERM or SIGHUP (a terminal that is closed) stops a run with a checkpoint, the second at
once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

from torchspec.contracts import RunStatus

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class View(Protocol):
    def status(self, status: RunStatus) -> None: ...
    def message(self, text: str, secret: str = "") -> None:
        """``secret`` follows the text where no log keeps it."""

    def log_to(self, path: Path) -> None:
        """The run has a folder now, and in it a log of what is said."""


class Interrupts:
    """Counts the signals between enter and exit: the second raises KeyboardInterrupt.

    A SIGHUP that was ignored before, as by ``nohup``, stays so. One that follows another signal is none: a shell that
    ends tells its jobs what the terminal has told them already.

    Args:
        message: told what the first one does.
    """

    def __init__(self, message: Callable[[str], None]):
        self.count, self._told = 0, False
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
        for number, before in self._before.items():
            if (number, before) != (signal.SIGHUP, signal.SIG_IGN):
                signal.signal(number, self._on_signal)

    def heard(self) -> bool:
        """Whether there was a signal; says so when it is asked after the first."""
        if self.count and not self._told:
            self._told = True
            self._message("interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once")
        return self._told

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Say nothing here: whatever the signal has interrupted may have hold of the output."""
        if number == signal.SIGHUP and self.count:
            return
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


def new_messages(seen: list[str], now: tuple[str, ...]) -> list[str]:
    """What ``now``, a sliding window of recent messages, has after ``seen``, the same window earlier."""
    longest = min(len(seen), len(now))
    overlap = next(n for n in range(longest, -1, -1) if seen[len(seen) - n :] == list(now[:n]))
    return list(now[overlap:])
