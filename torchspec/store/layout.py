"""Bytes that objects take in the store, and how many of its bytes samples may take."""

from __future__ import annotations

from collections.abc import Mapping

from torchspec.contracts import TensorSpec

USABLE_SHARE = 0.7
"""Share of the store that samples may fill, counted in ``stored_bytes``; the rest pays for fragmentation.

From a simulation of Mooncake's allocator with lengths drawn uniformly and samples freed nearly in order: in a store of
14 of the largest samples, no put in 6000 fails at 0.7, 0.2% at 0.75, 39% at 0.9; of 100 of them: none at 0.85.
"""

_SMALLEST_OBJECT = 4096
_MANTISSA_BITS = 3


def stored_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Upper bound of the segment bytes that these tensors occupy, each an object of its own."""
    return sum(object_bytes(spec.num_bytes) for spec in tensors.values())


def object_bytes(size: int) -> int:
    """Upper bound of the segment bytes that Mooncake takes for an object of ``size`` bytes.

    Its offset allocator rounds each request up to a number of four significant bits, so up to 1/8 more (mooncake-store,
    ``offset_allocator.cpp``), while the master's metrics count what was asked for. Segments above 3.75 GiB are counted
    in granules, 512 bytes at 1 TiB; the smallest object covers that.
    """
    step = 1 << max(0, size.bit_length() - 1 - _MANTISSA_BITS)
    return max(_SMALLEST_OBJECT, -(-size // step) * step)
