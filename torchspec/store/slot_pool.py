"""Variable-size slots in one buffer: who may use which bytes, and waiting for room."""

from __future__ import annotations

import threading
from bisect import insort
from time import monotonic

ALIGNMENT = 64
"""Bytes; a cache line, and a multiple of every element size."""


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class SlotPool:
    """First-fit allocator over ``[0, capacity)``. Thread-safe; requests are served in the order in which they came,
    so a large one is not starved by small ones."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._holes = [(0, capacity)]  # (offset, size), by offset, never adjacent
        self._slots: dict[int, int] = {}  # offset -> size
        self._room = threading.Condition()
        self._turn = threading.Lock()

    def allocate(self, size: int, timeout: float | None = None) -> int:
        """Offset of a slot of at least ``size`` bytes; waits until there is one.

        Raises:
            TimeoutError: there was none within ``timeout`` seconds.
        """
        size = align(size)
        assert 0 < size <= self.capacity, f"{size} bytes never fit into {self.capacity}"
        deadline = None if timeout is None else monotonic() + timeout
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError
        try:
            with self._room:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                if not self._room.wait_for(lambda: self._find(size) is not None, left):
                    raise TimeoutError
                return self._take(size)
        finally:
            self._turn.release()

    def release(self, offset: int) -> None:
        """Give back the slot at ``offset``."""
        with self._room:
            end = offset + self._slots.pop(offset)
            insort(self._holes, (offset, end - offset))
            at = self._holes.index((offset, end - offset))
            if at + 1 < len(self._holes) and self._holes[at + 1][0] == end:
                end += self._holes.pop(at + 1)[1]
            if at > 0 and sum(self._holes[at - 1]) == offset:
                at, offset = at - 1, self._holes.pop(at - 1)[0]
            self._holes[at] = (offset, end - offset)
            self._room.notify_all()

    def _find(self, size: int) -> int | None:
        return next((i for i, (_, hole) in enumerate(self._holes) if hole >= size), None)

    def _take(self, size: int) -> int:
        at = self._find(size)
        assert at is not None
        offset, hole = self._holes.pop(at)
        if hole > size:
            self._holes.insert(at, (offset + size, hole - size))
        self._slots[offset] = size
        return offset
