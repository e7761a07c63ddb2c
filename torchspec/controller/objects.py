"""The controller's hand in the store: credits for what is in it, and removal, now or in the background; nothing else.

While the store's master is away nothing can be removed; it comes back empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torchspec.contracts import SampleId
from torchspec.store.client import StoreClient, object_names
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreError

T = TypeVar("T")

log = logging.getLogger(__name__)

_ATTEMPTS, _PAUSE_SECONDS = 30, 1.0
"""What it takes to notice that a master is gone, and to start another."""
_LONG_PAUSE_SECONDS = 10.0
"""Between two such series of attempts."""
_WORKER_ENDS_SECONDS = 15.0
"""Children of a killed actor may live on for 11 s, and put what they hold."""


@dataclass
class Credits:
    """Bytes of the store that are spoken for: the store is a bounded buffer.

    They are reserved from the moment a lease is given out, at the sample's upper bound, and shrink to its true size
    once it is stored. No lease is given out beyond ``capacity``, so the store never has to refuse or evict.
    """

    capacity: int
    held: dict[SampleId, int] = field(default_factory=dict)
    used: int = 0

    def reserve(self, sample: SampleId, size: int) -> bool:
        """Reserve ``size`` bytes for ``sample`` in place of what it holds; False if they do not fit."""
        if not self.fits(sample, size):
            return False
        self.used += size - self.held.get(sample, 0)
        self.held[sample] = size
        return True

    def fits(self, sample: SampleId, size: int) -> bool:
        """Whether :meth:`reserve` would succeed."""
        return self.used + size - self.held.get(sample, 0) <= self.capacity

    def release(self, sample: SampleId) -> None:
        """Give back what ``sample`` has; nothing if it has none."""
        self.used -= self.held.pop(sample, 0)


class StoredObjects:
    """A store client that removes samples."""

    def __init__(self, endpoint: StoreEndpoint):
        self._endpoint = endpoint
        self._store: StoreClient | None = None
        self._suffixes: dict[str, None] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._repeats: set[asyncio.TimerHandle] = set()
        self._nobodys: set[str] = set()
        """Objects that were nobody's at the last sweep."""
        self._closing = False

    async def connect(self) -> None:
        """Join the store, as soon as it is there."""
        self._store = await self._insist(StoreClient, self._endpoint)

    def expect(self, suffixes: Iterable[str]) -> None:
        """Samples may have tensors with these suffixes, beside those of samples that were split in another way."""
        self._suffixes |= dict.fromkeys(suffixes)

    async def remove(self, keys: Iterable[str]) -> None:
        """Remove samples, however long the store is away: whoever repairs it decides when to give it up.

        Raises:
            StoreError: it is away, and all are leaving.
        """
        wanted = list(keys)
        while True:
            try:
                return await self._insist(self._remove, wanted)  # one thread for all: a step may free hundreds
            except StoreError:
                if self._closing:
                    raise
            await asyncio.sleep(_LONG_PAUSE_SECONDS)

    def remove_soon(self, keys: Iterable[str], then: Callable[[], None] = lambda: None) -> None:
        """Remove in the background, however long the store is away; ``then`` is called when all of them are gone."""
        wanted = list(keys)

        async def remove() -> None:
            try:
                await self.remove(wanted)
            except StoreError as error:
                log.warning("left to the end of the store: %s", error)
            else:
                then()

        task = asyncio.create_task(remove())
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def remove_twice(self, keys: Sequence[str]) -> None:
        """Remove what a dead worker may have stored: now, and when the last of its processes must have ended.

        One that is only cut off may end its puts later still: :meth:`sweep` finds them.
        """
        self.remove_soon(keys)

        def again() -> None:
            self._repeats.discard(handle)
            self.remove_soon(keys)

        handle = asyncio.get_running_loop().call_later(_WORKER_ENDS_SECONDS, again)
        self._repeats.add(handle)

    async def remove_all(self, prefix: str) -> None:
        """Remove every object whose key starts with ``prefix``."""
        assert self._store is not None
        await self._insist(self._store.remove_all, prefix)

    async def sweep(self, prefix: str, keys: Iterable[str]) -> int:
        """Remove what has a key that starts with ``prefix`` and is none of ``keys``, and was not the last time either,
        when it may just have been on its way. Returns how many objects; none while the store is away.
        """
        assert self._store is not None
        known = {name for key in keys for name in object_names(key, self._suffixes)}
        try:
            names = await asyncio.to_thread(self._store.names)
            nobodys = {name for name in names if name.startswith(prefix)} - known
            orphans, self._nobodys = sorted(nobodys & self._nobodys), nobodys
            await asyncio.to_thread(self._store.remove_objects, orphans)
        except StoreError as error:
            log.warning("%s", error)
            return 0
        return len(orphans)

    async def close(self) -> None:
        """Wait for what is being removed, then leave the store; if it is away, not for long."""
        self._closing = True
        for repeat in self._repeats:
            repeat.cancel()
        while self._removals:
            await asyncio.wait(self._removals)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    def _remove(self, keys: list[str]) -> None:
        assert self._store is not None
        for key in keys:
            self._store.remove(key, self._suffixes)

    async def _insist(self, call: Callable[..., T], *args: Any) -> T:
        """The result of ``call``, also if the store is away for a while. Raises StoreError: it stays away."""
        for _ in range(_ATTEMPTS):
            try:
                return await asyncio.to_thread(call, *args)
            except StoreError as error:
                log.warning("%s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
        return await asyncio.to_thread(call, *args)
