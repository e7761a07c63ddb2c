"""Where the positions of a sample are: what attention needs to know, and nothing else of a draft does.

A backend plans each micro-batch once. The plan says which rows this rank computes, and attends. Here is the backend for
samples that are whole on each rank; ``drafts/eagle3/sharded.py`` has the one for samples that several ranks share.

Shapes: B batch, S padded length, C context rows, R active rows, Q query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchspec.drafts.eagle3.attention import Block0, PaddedKernel, ttt_attention
from torchspec.drafts.eagle3.rows import TTTRows


class Sequences(Protocol):
    """The plan of one micro-batch."""

    @property
    def rows(self) -> TTTRows:
        """The rows that this rank computes, on the device."""

    @property
    def shape_BS(self) -> tuple[int, ...]:
        """What ``hs``, ``lhs`` and ``ids`` must measure."""

    def block0(self, k_CKE: Tensor, v_CKE: Tensor) -> Block0:
        """Keys and values of the context rows in step 0."""

    def later_keys_values(self, k_RKE: Tensor, v_RKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the active rows in a later step, as ``attend`` wants them."""

    def attend(self, q_RQE: Tensor, block0: Block0, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """o_RQE of one step; see :func:`ttt_attention`."""


class AttentionBackend(Protocol):
    def plan(self, loss_mask_BS: Tensor, lengths_B: Tensor, ttt_length: int, device: torch.device) -> Sequences:
        """Plan a micro-batch from the masks and lengths of its whole samples (CPU tensors)."""


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """Samples that are whole on this rank."""

    rows: TTTRows
    shape_BS: torch.Size

    def block0(self, k_CKE: Tensor, v_CKE: Tensor) -> Block0:
        k_BSKE, v_BSKE = (self._padded(x) for x in (k_CKE, v_CKE))
        return Block0(PaddedKernel(), (k_BSKE, v_BSKE, self.rows.active_flat_R))

    def later_keys_values(self, k_RKE: Tensor, v_RKE: Tensor) -> tuple[Tensor, Tensor]:
        return k_RKE, v_RKE

    def attend(self, q_RQE: Tensor, block0: Block0, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        return ttt_attention(q_RQE, block0, keys, values)

    def _padded(self, x_C: Tensor) -> Tensor:
        """Packed context rows at their places in a padded tensor of zeros."""
        flat = x_C.new_zeros(self.shape_BS.numel(), *x_C.shape[1:]).index_copy(0, self.rows.context_flat_C, x_C)
        return flat.unflatten(0, self.shape_BS)


class FlashBackend:
    """The backend of :class:`WholeSequences`: flash attention on padded batches."""

    def plan(self, loss_mask_BS: Tensor, lengths_B: Tensor, ttt_length: int, device: torch.device) -> WholeSequences:
        return WholeSequences(TTTRows.plan(loss_mask_BS, ttt_length).to(device), loss_mask_BS.shape)


FLASH = FlashBackend()
