"""Waiting without polling: what the controller's long-polls are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from torchspec.contracts import RankBatch, SampleId


class Signal:
    """Wakes everybody who waits. Waiters look at the state again, so a wake-up too many is harmless."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class FetchRound:
    """One attempt of all ranks to fetch a step. It is decided once, for all of them, when the last has reported."""

    def __init__(self, world_size: int) -> None:
        self.missing: set[SampleId] = set()
        self.decided = False
        self.outcome: list[RankBatch] | None = None
        """None: every rank has everything. Otherwise what all ranks fetch next for the same step."""
        self._world_size = world_size
        self._reported: set[int] = set()

    def report(self, rank: int, missing: Iterable[SampleId]) -> None:
        self._reported.add(rank)
        self.missing.update(missing)

    @property
    def complete(self) -> bool:
        return len(self._reported) == self._world_size

    def decide(self, outcome: list[RankBatch] | None) -> None:
        self.decided, self.outcome = True, outcome
