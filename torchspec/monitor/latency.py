"""Latencies as histograms with fixed bounds: cheap to keep, to add up over workers, to subtract over time.

A histogram is a tuple of counts, one for each bound and one for what took longer than the last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds in seconds."""

Histogram = tuple[int, ...]
EMPTY: Histogram = (0,) * (len(BOUNDS) + 1)


def observe(histogram: Histogram, seconds: float) -> Histogram:
    """``histogram`` with one latency more."""
    slot = bisect_left(BOUNDS, seconds)
    return (*histogram[:slot], histogram[slot] + 1, *histogram[slot + 1 :])


def since(now: Sequence[int], before: Sequence[int]) -> Histogram:
    """What came in between two readings of one histogram."""
    return tuple(a - b for a, b in zip(now, before, strict=True))


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Seconds that ``share`` of the latencies did not exceed, linear between bounds; None where there are none.

    What took longer than the last bound counts as that bound.
    """
    total = sum(histogram)
    if not total:
        return None
    wanted = share * total
    seen = list(accumulate(histogram))
    slot = next(i for i, count in enumerate(seen) if count >= wanted and histogram[i])
    if slot == len(BOUNDS):
        return BOUNDS[-1]
    low = BOUNDS[slot - 1] if slot else 0.0
    return low + (BOUNDS[slot] - low) * (wanted - (seen[slot] - histogram[slot])) / histogram[slot]
