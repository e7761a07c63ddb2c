"""Samples that are stored shard by shard, one for each sequence-parallel (SP) rank, under ``{key}_usp{rank}_{suffix}``.

Which rows a shard has is :class:`ShardFormula`'s to say, for the writer here and for the reader in
``training/fetch.py``. A shard's segments lie one after the other in one object, so a rank reads each tensor in one go.
A shard without rows has no objects.

Shapes: S tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from torchspec.contracts import TensorSpec
from torchspec.shards import Segment, ShardFormula

if TYPE_CHECKING:
    from torch import Tensor

    from torchspec.store.hidden_state_store import HiddenStateStore, Slot

WITHOUT_HALO = ("hs",)
"""What a rank reads of its own rows alone."""


def shard_suffix(rank: int, suffix: str) -> str:
    return f"usp{rank}_{suffix}"


def segment_rows(suffix: str, segment: Segment) -> slice:
    """Positions of the sample that a shard holds of tensor ``suffix`` for one of its segments."""
    return slice(segment.start, segment.stop if suffix in WITHOUT_HALO else segment.halo_stop)


def shard_tensors(
    whole: Mapping[str, TensorSpec], sharding: ShardFormula, num_tokens: int, rank: int
) -> dict[str, TensorSpec]:
    """The objects of one rank's shard, by suffix, from the tensors of the whole sample."""
    segments = sharding.segments(num_tokens, rank)
    shard = {}
    for suffix, spec in whole.items():
        rows = sum(part.stop - part.start for part in (segment_rows(suffix, segment) for segment in segments))
        if rows:
            shard[shard_suffix(rank, suffix)] = replace(spec, shape=(rows, *spec.shape[1:]))
    return shard


def put_usp_shards(store: HiddenStateStore, key: str, buffer: Slot, sharding: ShardFormula) -> Future[int]:
    """Store the shards of the whole sample in ``buffer``, all of them or none, and release the buffer.

    The store reads the segments where they are: no rank's shard is put together in memory first.

    Returns:
        As :meth:`HiddenStateStore.put`.
    """
    return store.put(key, buffer, _pieces(buffer.views, sharding))


def _pieces(views: Mapping[str, Tensor], sharding: ShardFormula) -> dict[str, list[Tensor]]:
    """Suffix of each shard's objects to the views that make it up."""
    num_tokens = len(views["ids"])
    pieces = {}
    for rank in range(sharding.size):
        segments = sharding.segments(num_tokens, rank)
        for suffix, view_S in views.items():
            parts = [part for part in (view_S[segment_rows(suffix, segment)] for segment in segments) if len(part)]
            if parts:
                pieces[shard_suffix(rank, suffix)] = parts
    return pieces
