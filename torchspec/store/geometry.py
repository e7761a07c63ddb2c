"""Shapes and bytes of this run's samples, for those who count them without holding one."""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.contracts import TensorSpec
from torchspec.store.layout import sample_tensors, stored_bytes


@dataclass(frozen=True, slots=True)
class SampleGeometry:
    """What one target's samples look like."""

    num_aux: int
    hidden_size: int
    dtype: str

    def tensors(self, num_tokens: int) -> dict[str, TensorSpec]:
        return sample_tensors(num_tokens, self.num_aux, self.hidden_size, self.dtype)

    def stored_bytes(self, num_tokens: int) -> int:
        """Upper bound of what a sample of ``num_tokens`` occupies in the store."""
        return stored_bytes(self.tensors(num_tokens))

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.tensors(1))
