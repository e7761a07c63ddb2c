"""A kind of draft as a module: what goes in, what comes out, and what every kind promises.

Whoever trains calls ``draft(batch, head)`` and nothing else of it. Results are sums: they are added over micro-batches
and ranks, and divided once.

Shapes: B batch, S padded length, A aux states concatenated (layers * H), H hidden size, K positions that are scored.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchspec.contracts import NormState
from torchspec.drafts.spec import DraftSpec
from torchspec.parallel.mesh import Sharing
from torchspec.target.head import TargetHead


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded with anything finite. B and S are at least 1.

    Where samples are sharded, ``hs``, ``lhs`` and ``ids`` hold this rank's windows of them (``ShardFormula.windows``: a
    segment a row, and its halo), while all else describes the whole samples on every rank.
    """

    hs_BSA: Tensor
    """Outputs of the draft's target layers, concatenated. Not read in a halo."""
    lhs_BSH: Tensor
    """Last hidden states; ``norm_state`` says whether the target's final norm has been applied."""
    ids_BS: Tensor
    loss_mask_BS: Tensor
    """bool, over tokens, False on padding. Stays on the CPU, where rows are selected without a device sync."""
    lengths_B: Tensor
    seeds_B: Tensor
    """Of each sample in its epoch; whatever a kind draws, it draws from these. Stays on the CPU."""
    norm_state: NormState = "post_norm"

    def to(self, device: torch.device | str) -> Batch:
        """Move what the device works on."""
        hs, lhs, ids = (x.to(device, non_blocking=True) for x in (self.hs_BSA, self.lhs_BSH, self.ids_BS))
        return replace(self, hs_BSA=hs, lhs_BSH=lhs, ids_BS=ids)


class DraftOutput(NamedTuple):
    """Sums over the micro-batch. A tuple, so that FSDP2 finds the tensors in it."""

    total: Tensor
    """Scalar to run backward on: losses times their weights."""
    denominator: Tensor
    """What the total is divided by, once it is summed over all ranks; 0-dim."""
    loss_K: Tensor
    counted_K: Tensor
    """Positions that have a loss: the target's first choice is in the draft's vocabulary."""
    supervised_K: Tensor
    """All positions that are scored."""
    correct_K: Tensor
    """Counted positions at which the draft's first choice is the target's."""


@dataclass(frozen=True)
class DraftOptions:
    """How a draft is to be computed; none of it changes what comes out."""

    loss_chunk_tokens: int = 1024
    """Logits of about so many positions exist at the same time."""
    recompute: bool = False
    """Recompute decoder layers in the backward: less memory, more time."""
    sharing: Sharing | None = None
    """None: every sample is whole on this rank."""


class Draft(nn.Module):
    """A trainable draft. Its parameters carry exactly the names that servers load.

    The target's embedding, final norm and head stay outside (:class:`TargetHead`). All parameters are used inside
    :meth:`forward`, the only entry, so FSDP2 can gather them there. A batch without any loss token gives a zero total
    that still reaches every parameter, so that all ranks run the same collectives.
    """

    def __init__(self, spec: DraftSpec, options: DraftOptions | None = None):
        super().__init__()
        self.spec, self.options = spec, options or DraftOptions()

    @abstractmethod
    def forward(self, batch: Batch, head: TargetHead) -> DraftOutput:
        """Loss and counts of one micro-batch on the parameters' device (but for what stays on the CPU).

        Raises:
            ValueError: see :meth:`check`.
        """

    def check(self, batch: Batch, head: TargetHead) -> None:
        """Raises ValueError: the head's vocabulary or the width of the aux states does not fit."""
        spec = self.spec
        tokens, width = spec.vocab_size or spec.target.vocab_size, len(spec.layers) * spec.target.hidden_size
        if len(head.draft_head_DH) != tokens:
            raise ValueError(
                f"the target head was loaded for {len(head.draft_head_DH)} draft tokens, draft.vocab_size is {tokens}"
            )
        if batch.hs_BSA.shape[-1] != width:
            raise ValueError(
                f"aux states are {batch.hs_BSA.shape[-1]} wide; {len(spec.layers)} layers of "
                f"{spec.target.hidden_size} make {width}"
            )

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """A decoder layer, which the backward runs again where ``recompute`` says so."""
        return checkpoint(layer, *inputs, use_reentrant=False) if self.options.recompute else layer(*inputs)

    def units(self) -> list[nn.Module]:
        """Modules that FSDP2 gathers by themselves, beside the whole."""
        return []

    @abstractmethod
    def compile(self) -> None:
        """Compile in place what of it can be, where nn.Module would compile the whole forward."""
