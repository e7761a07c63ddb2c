"""Splits one step's samples over the data-parallel ranks and into micro-batches: one function, used by all queues."""

from __future__ import annotations

from collections.abc import Sequence

from torchspec.contracts import MicroBatches, SampleRef


def split_batch(refs: Sequence[SampleRef], dp_size: int, micro_batch_size: int) -> list[MicroBatches]:
    """Micro-batches for each data-parallel rank, as many on every rank (empty tuples where a rank has no more).

    Longest first to the rank with the fewest tokens, so ranks finish together and a micro-batch holds samples of like
    length (padding is wasted work). Depends on the refs alone: the same step always splits the same way.
    """
    share = -(-len(refs) // dp_size)
    ranks: list[list[SampleRef]] = [[] for _ in range(dp_size)]
    for ref in sorted(refs, key=lambda r: (-r.num_tokens, r.sample)):
        open_ranks = [r for r in ranks if len(r) < share]
        min(open_ranks, key=lambda r: sum(s.num_tokens for s in r)).append(ref)
    count = max(1, -(-max(len(r) for r in ranks) // micro_batch_size))
    return [
        tuple(tuple(rank[i * micro_batch_size : (i + 1) * micro_batch_size]) for i in range(count)) for rank in ranks
    ]
