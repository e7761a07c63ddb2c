"""Soft cross-entropy of a draft's head against the target's, fused with both projections.

For teachers n and TTT steps t the loss is the cross-entropy between p_n, the target's softmax renormalised over the
draft vocabulary, and q_tn, the draft's softmax. One custom autograd function walks over chunks of teachers. For each
chunk it makes the target's logits once, then the draft's logits of all steps, turns these in place into the gradient
q - p, and takes the gradients of the hidden states and of the head from it *in the forward pass*, as Liger's fused
linear cross-entropy does. At no time do logits exist for more than one chunk.

A teacher counts when the target's first choice over its whole vocabulary is in the draft's. Accuracy asks whether the
draft's first choice is the target's.

Matmuls run in the autocast dtype where autocast is on; everything else, and every sum, in float32 (float64 for
float64 inputs).

Shapes: N teachers, n teachers of a chunk, T TTT steps, H hidden size, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_ELEMENTS = 2**19
"""Logits worked on at once on a CPU (2 MiB), so that the passes over them stay in its cache."""


class LossSums(NamedTuple):
    """Sums over teachers. Only ``total`` is differentiable."""

    total: Tensor
    """Scalar: sum over t of ``step_weights[t] * loss_T[t]``."""
    loss_T: Tensor
    counted_T: Tensor
    correct_T: Tensor


class Teacher(NamedTuple):
    """The target's hidden states (after its final norm) and its head's rows, the draft vocabulary's apart."""

    hidden_NH: Tensor
    draft_head_DH: Tensor
    rest_head_XH: Tensor
    """The V - D rows that are not in the draft vocabulary."""

    def chunk(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """p_nD, the index of its largest entry choice_n1, and counted_n."""
        hidden_nH = self.hidden_NH[rows].to(dtype)
        p_nD = accumulating(F.linear(hidden_nH, self.draft_head_DH.to(dtype)))
        best_n1, choice_n1 = p_nD.max(-1, keepdim=True)
        counted_n = torch.ones_like(best_n1, dtype=torch.bool).squeeze(1)
        if len(self.rest_head_XH):
            rest_nX = F.linear(hidden_nH, self.rest_head_XH.to(dtype))
            counted_n = best_n1.squeeze(1) >= rest_nX.amax(-1)
        for block in _row_blocks(len(p_nD), p_nD.shape[1], p_nD.device):
            p = p_nD[block].sub_(best_n1[block]).exp_()
            p.mul_(p.sum(-1, keepdim=True).reciprocal_())
        return p_nD, choice_n1, counted_n


def accumulating(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums are taken in: float32, or float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype of the device of ``x`` where autocast is on, else the dtype of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _row_blocks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of ``rows`` rows to work on one after the other: few at a time on a CPU, all at once elsewhere.

    ``width`` counts the logits of one row.
    """
    step = max(1, CACHE_ELEMENTS // width) if device.type == "cpu" else rows
    return [slice(start, start + step) for start in range(0, rows, step)]


def _cross_entropy_(z_TnD: Tensor, p_nD: Tensor, choice_n1: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits ``z`` into the gradient ``softmax(z) - p`` in place.

    Returns:
        loss_Tn, in the accumulating dtype, and correct_Tn (bool).
    """
    steps, rows, width = z_TnD.shape
    losses, corrects = [], []
    for block in _row_blocks(rows, steps * width, z_TnD.device):
        z, p = z_TnD[:, block], p_nD[block]
        x = accumulating(z)
        best, argmax = x.max(-1, keepdim=True)
        corrects.append(argmax == choice_n1[block])
        x.sub_(best)
        expected = (p * x).sum(-1, keepdim=True)
        total = x.exp_().sum(-1, keepdim=True)
        losses.append(total.log() - expected)
        x.mul_(total.reciprocal_()).sub_(p)
        if x is not z:
            z.copy_(x)
    return torch.cat(losses, 1).squeeze(2), torch.cat(corrects, 1).squeeze(2)


class FusedSoftCrossEntropy(torch.autograd.Function):
    """See :func:`fused_soft_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TNH: Tensor,
        head_DH: Tensor,
        teacher: Teacher,
        scored_TN: Tensor,
        step_weights_T: Tensor,
        chunk: int,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps, teachers, _ = hidden_TNH.shape
        sums_3T = step_weights_T.new_zeros(3, steps)
        dhidden_TNH = torch.empty_like(hidden_TNH if with_grad else hidden_TNH[:0])
        dhead_DH = torch.zeros_like(head_DH if with_grad else head_DH[:0], dtype=sums_3T.dtype)
        head = head_DH.to(dtype)
        size = max(1, chunk // steps)
        for rows in (slice(start, start + size) for start in range(0, teachers, size)):
            p_nD, choice_n1, counted_n = teacher.chunk(rows, dtype)
            hidden_TnH = hidden_TNH[:, rows].to(dtype)
            z_TnD = F.linear(hidden_TnH, head)
            loss_Tn, correct_Tn = _cross_entropy_(z_TnD, p_nD, choice_n1)
            weight_Tn = (counted_n & scored_TN[:, rows]).to(loss_Tn.dtype)
            sums_3T += torch.stack((weight_Tn * loss_Tn, weight_Tn, weight_Tn * correct_Tn)).sum(2)
            if with_grad:
                weight_Tn1 = (weight_Tn * step_weights_T.unsqueeze(1)).unsqueeze(2)
                dhidden_TNH[:, rows] = (z_TnD @ head) * weight_Tn1
                _add_outer_(dhead_DH, z_TnD.flatten(0, 1), (hidden_TnH * weight_Tn1).to(dtype).flatten(0, 1))
        loss_T, counted_T, correct_T = sums_3T
        ctx.mark_non_differentiable(loss_T, counted_T, correct_T)
        ctx.save_for_backward(dhidden_TNH, dhead_DH)
        ctx.head_dtype = head_DH.dtype
        return loss_T @ step_weights_T, loss_T, counted_T, correct_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TNH, dhead_DH = ctx.saved_tensors
        dhidden_TNH = dhidden_TNH * dtotal.to(dhidden_TNH.dtype)
        return dhidden_TNH, (dhead_DH * dtotal).to(ctx.head_dtype), None, None, None, None, None, None


def _add_outer_(sum_DH: Tensor, z_mD: Tensor, hidden_mH: Tensor) -> None:
    """sum += z^T hidden, the sum in its own (higher) precision."""
    if z_mD.dtype == sum_DH.dtype:
        sum_DH.addmm_(z_mD.t(), hidden_mH)
    else:
        sum_DH += z_mD.t() @ hidden_mH


def fused_soft_cross_entropy(
    hidden_TNH: Tensor,
    head_DH: Tensor,
    teacher: Teacher,
    scored_TN: Tensor,
    step_weights: Sequence[float],
    chunk: int,
) -> LossSums:
    """Un-normalised EAGLE3 loss of all TTT steps, differentiable in ``hidden_TNH`` and ``head_DH``.

    Args:
        hidden_TNH: the draft's hidden states (after its norm) that step t scores against teacher n.
        head_DH: the draft's head.
        teacher: the target's side, for the same N.
        scored_TN: False where step t has no student for teacher n; such a pair adds nothing.
        step_weights: weight of each step in ``total``.
        chunk: logits of about so many (step, teacher) pairs exist at the same time.

    Without grad mode nothing is computed for a backward.
    """
    with_grad = torch.is_grad_enabled() and (hidden_TNH.requires_grad or head_DH.requires_grad)
    dtype = compute_dtype(hidden_TNH)
    weights_T = torch.tensor(step_weights, dtype=accumulating(hidden_TNH[:0]).dtype, device=hidden_TNH.device)
    with torch.autocast(hidden_TNH.device.type, enabled=False):  # autocast would take the sums in low precision
        return LossSums(
            *FusedSoftCrossEntropy.apply(hidden_TNH, head_DH, teacher, scored_TN, weights_T, chunk, dtype, with_grad)
        )
