"""All that the controller writes, in order and on a thread of its own, so that a slow file server never holds it up.

    put             what the run cannot do without: journal, answers, rejections, config. Once one of these has failed,
                    nothing of the kind is written any more, and :attr:`WriteQueue.failure` says why
    put_for_views   what is only looked at: a failure leaves a gap, and :meth:`WriteQueue.news` says so

The queue is bounded by those who wait for :meth:`WriteQueue.room` before they make more work for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torchspec.call_thread import CallThread
from torchspec.monitor.snapshot import EventKind

MOST_WAITING = 10_000
"""Lines that may wait: some ten seconds of a large run, an hour of a small one; tens of megabytes."""
STALL_SECONDS = 10.0
"""A write that takes longer is worth a word."""
GAP_SECONDS = 60.0
"""So often it is said that files for views cannot be written."""
_ROOM_SECONDS = 0.2


class WriteFailed(RuntimeError):
    """The run's folder does not take what the run cannot do without; the message names the file."""


class WriteQueue:
    """See the module's docstring. ``run_dir``: where all of it lies."""

    def __init__(self, run_dir: Path):
        self._run_dir, self._thread = run_dir, CallThread("files")
        self.failure = ""
        """Why the run cannot go on, if so."""
        self._gap = ""
        self._told, self._stalled = -GAP_SECONDS, False

    def put(self, call: Callable[..., Any], *args: Any) -> None:
        """Let ``call(*args)`` write what the run cannot do without."""
        self._thread.submit(self._write, call, args)

    def put_for_views(self, call: Callable[..., Any], *args: Any) -> Future[None]:
        """Let ``call(*args)`` write what is only looked at. The future is done when it has, or could not."""
        return self._thread.submit(self._write_for_views, call, args)

    async def written(self) -> None:
        """Returns when all that has been put so far is written. Raises WriteFailed: it cannot be."""
        await asyncio.wrap_future(self._thread.submit(lambda: None))
        if self.failure:
            raise WriteFailed(self.failure)

    async def room(self) -> None:
        """Returns when the queue has room for more."""
        while self._thread.waiting >= MOST_WAITING:
            await asyncio.sleep(_ROOM_SECONDS)

    def news(self) -> Iterator[tuple[EventKind, str]]:
        """What has gone wrong, or right again, since the last call; once a minute about files for views."""
        seconds, now = self._thread.busy_seconds, time.monotonic()
        if self._gap and now > self._told + GAP_SECONDS:
            yield "trouble", f"{self._gap}. What views show has a gap; training goes on"
            self._gap, self._told = "", now
        stalled = seconds >= STALL_SECONDS
        if stalled and not self._stalled:
            where = f"{self._run_dir} has taken no write for {seconds:.0f} s"
            yield "trouble", f"{where}; training goes on while {MOST_WAITING:,} lines may wait"
        if self._stalled and not stalled:
            yield "note", f"{self._run_dir} takes writes again"
        self._stalled = stalled

    async def close(self) -> None:
        """Returns when everything is written. Raises WriteFailed: it cannot be."""
        await self.written()
        self._thread.close(0)

    def _write(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self.failure:  # a file with a hole would be worse than one that ends
            return
        try:
            call(*args)
        except Exception as error:  # which nobody waits for
            self.failure = _reason(error)

    def _write_for_views(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            call(*args)
        except Exception as error:  # as above
            self._gap = _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename}: {error.strerror}; make room there, or mend its disk"
    return f"a file cannot be written: {type(error).__name__}: {error}"
