"""The controller's hand in the store: it removes objects, now or in the background, and does nothing else there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.hidden_state_store import HiddenStateStore

BUFFER_BYTES = 1 << 20
"""Who only removes needs hardly any buffer."""


class StoredObjects:
    """A store client that removes samples, whose tensors have these ``suffixes``."""

    def __init__(self, endpoint: StoreEndpoint, suffixes: Sequence[str]):
        self._store, self._suffixes = HiddenStateStore(endpoint, BUFFER_BYTES), suffixes
        self._removals: set[asyncio.Task[None]] = set()

    async def remove(self, keys: Iterable[str]) -> None:
        await asyncio.to_thread(self._remove, list(keys))  # one thread for all: a step may free hundreds

    def remove_soon(self, keys: Iterable[str], then: Callable[[], None]) -> None:
        """Remove in the background; ``then`` is called when all of them are gone."""

        async def remove() -> None:
            await self.remove(keys)
            then()

        task = asyncio.create_task(remove())
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def _remove(self, keys: list[str]) -> None:
        for key in keys:
            self._store.remove(key, self._suffixes)

    async def close(self) -> None:
        """Wait for what is being removed, then leave the store."""
        if self._removals:
            await asyncio.wait(self._removals)
        await asyncio.to_thread(self._store.close)
