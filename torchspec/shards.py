"""Which positions of a sample a sequence-parallel (SP) rank holds: the one formula, for writers and readers.

Needs neither torch nor numpy, so that the producer, the controller and the trainer can all ask it.

``N = ulysses_size * ring_size`` ranks share a sample; rank ``r`` is Ulysses rank ``r % U`` of ring rank ``r // U``. A
sample of S tokens is cut into equal *chunks* (the last ones may be short or empty), one or two a rank:

    contiguous   N chunks of ceil(S / N);      rank r owns chunk r
    zigzag       2N chunks of ceil(S / 2N);    rank r owns chunks r and 2N - 1 - r, which gives every ring rank the
                                               same share of a causal attention (Brandon et al., arXiv 2311.09431)

With either, the chunks of one ring rank's U members lie side by side: together they are one run of positions for each
*part* (the chunk of a rank's own number, and its mirror image).

**A rank's shard of a sample** is its *segments*, one a part, in the order of the parts, the empty ones included:

    hs        rows [start, stop)         of each segment, one after the other: the rows that the rank computes
    ids, lhs  rows [start, halo_stop)    of each segment, one after the other: besides, the *halo*

The halo is the positions behind a segment that its rows read tokens and target states of, as many as the kind of draft
says (fewer at the end of the sample). An empty segment has no halo. Nothing is padded: shapes follow from the number
of tokens and the rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Layout = Literal["contiguous", "zigzag"]


class Segment(NamedTuple):
    """Positions of one sample. Owned: ``start`` to ``stop``; readable: to ``halo_stop``."""

    start: int
    stop: int
    halo_stop: int


@dataclass(frozen=True, slots=True)
class ShardFormula:
    """How samples are split. Equal on every rank of a run and in its producers.

    Raises:
        ValueError: a size is not positive, or the layout is unknown.
    """

    ulysses_size: int
    ring_size: int
    layout: Layout
    halo: int

    def __post_init__(self) -> None:
        for name in ("ulysses_size", "ring_size", "halo"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(get_args(Layout))}")

    @property
    def size(self) -> int:
        """Ranks that share a sample."""
        return self.ulysses_size * self.ring_size

    @property
    def parts(self) -> int:
        """Segments of one rank."""
        return 1 if self.layout == "contiguous" else 2

    def chunk(self, num_tokens: int) -> int:
        """Positions of a full segment."""
        return -(-num_tokens // (self.size * self.parts))

    def segments(self, num_tokens: int, rank: int) -> tuple[Segment, ...]:
        """The segments of SP rank ``rank``, one a part."""
        assert 0 <= rank < self.size
        return tuple(self._segment(num_tokens, rank, part) for part in range(self.parts))

    def ring_segment(self, num_tokens: int, ring_rank: int, part: int) -> tuple[int, int]:
        """First position and end of what the members of a ring rank own together in one part."""
        members = range(ring_rank * self.ulysses_size, (ring_rank + 1) * self.ulysses_size)
        segments = [self._segment(num_tokens, rank, part) for rank in members]
        return min(s.start for s in segments), max(s.stop for s in segments)

    def windows(self, lengths: Sequence[int], rank: int) -> Iterator[tuple[int, Segment]]:
        """The rows of a rank's padded batch, top to bottom: for each sample its number and its segments."""
        for sample, num_tokens in enumerate(lengths):
            for segment in self.segments(num_tokens, rank):
                yield sample, segment

    def window_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a rank's padded batch, the same on all ranks; columns include the halo."""
        return len(lengths) * self.parts, self.chunk(max(lengths)) + self.halo

    def _segment(self, num_tokens: int, rank: int, part: int) -> Segment:
        chunk = self.chunk(num_tokens)
        number = rank if part == 0 else 2 * self.size - 1 - rank
        start, stop = min(number * chunk, num_tokens), min((number + 1) * chunk, num_tokens)
        return Segment(start, stop, min(stop + self.halo, num_tokens) if start < stop else stop)


def key_value_repeats(num_heads: int, num_kv_heads: int, ulysses_size: int) -> int:
    """How often each key/value head is repeated so that every rank finds those of its query heads among its own.

    Raises:
        ValueError: the query heads cannot be shared out evenly.
    """
    if num_heads % ulysses_size:
        valid = ", ".join(str(u) for u in range(1, num_heads + 1) if num_heads % u == 0)
        raise ValueError(
            f"training.sp_ulysses_size={ulysses_size} does not divide the draft's {num_heads} query heads: choose one "
            f"of {valid}, and make up the rest with training.sp_ring_size"
        )
    return ulysses_size // math.gcd(num_kv_heads, ulysses_size)
