"""The arithmetic of one optimizer step over all ranks: gradients, sums, normalisation, clipping.

Each rank adds up the gradients of its micro-batches, un-normalised. The gradients and the sums (``StepSums``) are then
summed over all ranks, sequence-parallel and data-parallel ones alike, and divided once by the global number of counted
positions. The collectives and their order depend on the number of micro-batches alone, which all ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchspec.drafts.eagle3.model import Batch, DraftOutput
from torchspec.training.optimizer import scale_and_clip, sum_over_ranks
from torchspec.training.sums import StepSums

Forward = Callable[[Batch], DraftOutput]


def add_gradients(
    draft: nn.Module, micro_batches: Sequence[Batch], forward: Forward, sums: StepSums, counts_tokens: bool
) -> None:
    """Forward and backward of this rank's micro-batches; their sums are added to ``sums``.

    Args:
        counts_tokens: False on all but one of the ranks that share samples, whose tokens count once.
    """
    for number, batch in enumerate(micro_batches, start=1):
        if isinstance(draft, FSDPModule):  # gradients are reduced once a step
            draft.set_requires_gradient_sync(number == len(micro_batches))
        output = forward(batch)
        output.total.backward()
        sums.add(output, int(batch.lengths_B.sum()) if counts_tokens else 0)


def reduce_gradients(draft: nn.Module, sums: StepSums, clip: float) -> Tensor:
    """Sum over all ranks, normalise and clip, in place.

    Returns:
        The gradient norm before clipping; see :func:`scale_and_clip`.
    """
    sharded = isinstance(draft, FSDPModule)
    dist.all_reduce(sums.flat)
    if not sharded and dist.get_world_size() > 1:
        sum_over_ranks(draft.parameters())
    scale = 1.0 / sums.counted.clamp(min=1.0)
    return scale_and_clip(draft.parameters(), scale, clip, dist.group.WORLD if sharded else None)
