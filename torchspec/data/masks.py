"""Loss masks as they travel and lie on disk: one bit a token, most significant bit first, the last byte filled up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_mask(mask: Sequence[bool] | Sequence[int] | np.ndarray) -> bytes:
    """Pack a 0/1 mask into bits."""
    return np.packbits(np.asarray(mask, dtype=bool)).tobytes()


def unpack_mask(packed: bytes, length: int) -> list[bool]:
    """Inverse of :func:`pack_mask`.

    Raises:
        ValueError: ``packed`` does not hold exactly ``length`` bits (rounded up to whole bytes).
    """
    if len(packed) != (length + 7) // 8:
        raise ValueError(f"a mask of {len(packed)} bytes cannot describe {length} tokens")
    bits = np.frombuffer(packed, dtype=np.uint8)
    return np.unpackbits(bits, count=length).astype(bool).tolist()
