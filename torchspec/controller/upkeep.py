"""What the controller does without being called: watches its pools and its files, and writes down what views show.

Each of these is a task of its own. One that fails is an event, which every view shows, and starts again; what the run
cannot go on without ends it, with one line, by way of :attr:`Upkeep.failure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspec.controller.controller import Controller

log = logging.getLogger(__name__)

AUTOSCALE_SECONDS, OBSERVATIONS = 10.0, 20
"""How often the size of the inference pool is thought about, and how many observations that rests on."""
FILES_SECONDS = 1.0
"""How often it is seen to what has become of what was to be written."""
SWEEP_SECONDS = 60.0
"""How often the store is looked through for what is nobody's."""
AGAIN_SECONDS = 5.0
"""After a failure."""


class Upkeep:
    """The tasks of one controller."""

    def __init__(self, controller: Controller):
        self._controller, self._observer = controller, controller.observer
        self._tasks: list[asyncio.Task[None]] = []
        self.failure = ""
        """Why the run cannot go on, if so."""

    def start(self) -> None:
        works = {
            "following the pools": self._follow_pools,
            "recording": self._record,
            "watching files": self._files,
            "sweeping the store": self._sweep,
        }
        self._tasks = [asyncio.create_task(self._keep(what, work)) for what, work in works.items()]
        asyncio.get_running_loop().set_exception_handler(self._unheard)

    def end(self) -> None:
        """The run is over; what is recorded last, others record."""
        for task in self._tasks:
            task.cancel()

    def _unheard(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something went wrong in a task that nobody waits for, as one that removes objects and gives credits back."""
        loop.default_exception_handler(context)
        self._observer.note(f"a mistake in the controller: {context.get('exception', context['message'])!r}", "trouble")

    async def _keep(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                return await work()
            except Exception as error:  # a mistake of ours, which nobody waits for
                log.exception("%s failed", what)
                message = f"{what} failed in the controller, and starts again: {type(error).__name__}: {error}"
                self._observer.note(message, "trouble")
            await asyncio.sleep(AGAIN_SECONDS)

    async def _follow_pools(self) -> None:
        """See now and then which pool waits for the other, let the inference pool follow, and try the store again."""
        controller = self._controller
        while True:
            for _ in range(OBSERVATIONS):
                await asyncio.sleep(AUTOSCALE_SECONDS / OBSERVATIONS)
                controller.observe_pools()
            controller.buffer.unpark()  # others than our own steps may have made room in the store
            controller.advance()
            if move := controller.pool.autoscale(controller.buffer.ledger.trained_step):
                self._observer.scaled(move.workers, move.reason)

    async def _record(self) -> None:
        """Write a snapshot each ``monitor.history_seconds``, and when there is news."""
        observer = self._observer
        while observer.interval:
            observer.news.clear()
            await observer.record(await self._controller.status())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(observer.news.wait(), observer.interval)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self._controller.buffer.sweep()

    async def _files(self) -> None:
        """Say what cannot be written, and end the run if it cannot do without that."""
        files = self._observer.files
        while not files.failure:
            await asyncio.sleep(FILES_SECONDS)
            for kind, line in files.news():
                self._observer.note(line, kind)
        self.failure = files.failure
        self._controller.pool.changed.fire()
