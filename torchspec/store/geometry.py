"""Shapes and bytes of this run's samples, for those who count them without holding one."""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.contracts import TensorSpec
from torchspec.shards import ShardFormula
from torchspec.store.layout import sample_tensors, stored_bytes
from torchspec.store.usp import shard_suffix, shard_tensors


@dataclass(frozen=True, slots=True)
class SampleGeometry:
    """What one target's samples look like, and how they are split, if they are."""

    num_aux: int
    hidden_size: int
    dtype: str
    sharding: ShardFormula | None = None

    def tensors(self, num_tokens: int) -> dict[str, TensorSpec]:
        """The whole sample."""
        return sample_tensors(num_tokens, self.num_aux, self.hidden_size, self.dtype)

    def shard(self, num_tokens: int, rank: int) -> dict[str, TensorSpec]:
        """What SP rank ``rank`` reads: its shard, or the whole sample where none is split."""
        whole = self.tensors(num_tokens)
        return whole if self.sharding is None else shard_tensors(whole, self.sharding, num_tokens, rank)

    def stored_bytes(self, num_tokens: int) -> int:
        """Upper bound of what a sample of ``num_tokens`` occupies in the store."""
        return sum(stored_bytes(self.shard(num_tokens, rank)) for rank in range(self._ranks))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of all objects that a sample may have."""
        names = tuple(self.tensors(1))
        if self.sharding is None:
            return names
        return tuple(shard_suffix(rank, name) for rank in range(self._ranks) for name in names)

    @property
    def _ranks(self) -> int:
        return 1 if self.sharding is None else self.sharding.size
