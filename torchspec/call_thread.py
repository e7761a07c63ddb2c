"""Calls that one thread makes, one after the other, so that whoever asks for them is not held up by a slow one.

The thread is a daemon: one that hangs in a call for ever keeps no process from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class CallThread:
    """See the module's docstring. It waits for no room: whoever wants a bounded queue looks at :attr:`waiting`."""

    def __init__(self, name: str):
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._since: float | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return self._calls.qsize()

    @property
    def busy_seconds(self) -> float:
        """How long the call that is being made has taken; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Make ``call(*args)`` after those before it; its result, or what it raised, comes with the future."""
        future: Future[Any] = Future()
        self._calls.put((future, call, args))
        return future

    def close(self, timeout: float | None = None) -> bool:
        """Let the thread end after what has been asked for. Whether it has, within ``timeout`` seconds."""
        self._calls.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, args = item
            if not future.set_running_or_notify_cancel():
                continue
            self._since = time.monotonic()
            try:
                future.set_result(call(*args))
            except BaseException as error:  # it is the asker's
                future.set_exception(error)
            self._since = None
