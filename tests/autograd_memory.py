"""What a forward takes: the bytes that autograd keeps, held against a plan of memory, and the largest tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.drafts.draft import Batch, Draft
from torchspec.target.head import TargetHead


def kept_by_a_forward(draft: Draft, dtype: str, samples: int, num_tokens: int) -> int:
    """Bytes that are kept for the backward, apart from weights, heads and their copies. Every token has a loss."""
    spec, target, low = draft.spec, draft.spec.target, getattr(torch, dtype)
    head_VH = torch.randn(target.vocab_size, target.hidden_size).to(low)
    known = spec.vocab_size or target.vocab_size
    norm_H = torch.ones(target.hidden_size, dtype=low)
    head = TargetHead(head_VH, head_VH[:known], head_VH[known:], norm_H, target.rms_norm_eps)
    shape = samples, num_tokens
    batch = Batch(
        hs_BSA=torch.randn(*shape, len(spec.layers) * target.hidden_size).bfloat16(),
        lhs_BSH=torch.randn(*shape, target.hidden_size).bfloat16(),
        ids_BS=torch.randint(target.vocab_size, shape, dtype=torch.int32),
        loss_mask_BS=torch.ones(shape, dtype=torch.bool),
        lengths_B=torch.full((samples,), num_tokens),
        seeds_B=torch.arange(samples),
    )
    weights = {x.numel() for x in (*draft.parameters(), head_VH)}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.numel() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16),
    ):
        # until the sum is done, ``output`` holds the graph, and no storage is given away twice
        output = draft(batch, head)
        return sum(kept.values()) if output.total.requires_grad else 0


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had, as far as it has memory."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
