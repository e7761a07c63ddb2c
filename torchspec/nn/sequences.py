"""Where the positions of a sample are: what attention needs to know, and nothing else of a draft does.

Each micro-batch is planned once. The plan says which rows this rank computes, and attends. Here is the one for samples
that are whole on each rank; ``parallel/usp.py`` has the one for samples that several ranks share.

Shapes: B batch, S padded length, C context rows, R active rows, Q query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchspec.nn.chain_attention import Block0, PaddedKernel, chain_attention
from torchspec.nn.chain_rows import ChainRows
from torchspec.nn.flash import scatter_rows


class Sequences(Protocol):
    """The plan of one micro-batch."""

    @property
    def rows(self) -> ChainRows:
        """The rows that this rank computes, on the device."""

    @property
    def shape_BS(self) -> tuple[int, ...]:
        """What ``hs``, ``lhs`` and ``ids`` must measure."""

    def block0(self, k_CKE: Tensor, v_CKE: Tensor) -> Block0:
        """Keys and values of the context rows for position 0."""

    def later_keys_values(self, k_RKE: Tensor, v_RKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the active rows for a later position, as ``attend`` wants them."""

    def attend(self, q_RQE: Tensor, block0: Block0, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """o_RQE for one position; see :func:`chain_attention`."""


Planner = Callable[[Tensor, Tensor, int, torch.device], Sequences]
"""From the masks [B, S] and lengths [B] of whole samples (CPU tensors), the number of positions and the device."""


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """Samples that are whole on this rank: flash attention on padded batches."""

    rows: ChainRows
    shape_BS: torch.Size

    @classmethod
    def plan(cls, loss_mask_BS: Tensor, lengths_B: Tensor, num_positions: int, device: torch.device) -> WholeSequences:
        """A :data:`Planner`."""
        return cls(ChainRows.plan(loss_mask_BS, num_positions).to(device), loss_mask_BS.shape)

    def block0(self, k_CKE: Tensor, v_CKE: Tensor) -> Block0:
        k_BSKE, v_BSKE = (self._padded(x) for x in (k_CKE, v_CKE))
        return Block0(PaddedKernel(), (k_BSKE, v_BSKE, self.rows.active_flat_R))

    def among_context(self, block0: Block0) -> Block0:
        """The same keys and values for queries of the context rows, which layers below the last compute in full."""
        k_BSKE, v_BSKE, _ = block0.tensors
        return Block0(block0.kernel, (k_BSKE, v_BSKE, self.rows.context_flat_C))

    def later_keys_values(self, k_RKE: Tensor, v_RKE: Tensor) -> tuple[Tensor, Tensor]:
        return k_RKE, v_RKE

    def attend(self, q_RQE: Tensor, block0: Block0, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        return chain_attention(q_RQE, block0, keys, values)

    def _padded(self, x_C: Tensor) -> Tensor:
        return scatter_rows(x_C, self.rows.context_flat_C, self.shape_BS.numel()).unflatten(0, self.shape_BS)
