"""Byte credits: the store is a bounded buffer.

Bytes are reserved from the moment a lease is given out, at the sample's upper bound, and shrink to its true size once
it is stored. The producer stops when they run out, so the store never has to refuse or evict.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass
class Credits:
    """Reservations against ``capacity`` bytes, one for each holder."""

    capacity: int
    held: dict[Hashable, int] = field(default_factory=dict)
    used: int = 0

    def reserve(self, holder: Hashable, size: int) -> bool:
        """Reserve ``size`` bytes for ``holder`` in place of what it holds; False if they do not fit."""
        if not self.fits(holder, size):
            return False
        self.used += size - self.held.get(holder, 0)
        self.held[holder] = size
        return True

    def fits(self, holder: Hashable, size: int) -> bool:
        """Whether :meth:`reserve` would succeed."""
        return self.used + size - self.held.get(holder, 0) <= self.capacity

    def release(self, holder: Hashable) -> None:
        """Give back what ``holder`` has; nothing if it has none."""
        self.used -= self.held.pop(holder, 0)
