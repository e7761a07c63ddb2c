"""Waiting without polling: what the controller's long-polls are made of."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes everybody who waits. Waiters look at the state again, so a wake-up too many is harmless."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()
