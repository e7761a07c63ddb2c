"""Which rows a training-time-test (TTT) forward works on: decided once per batch, on the CPU, from the loss mask.

Row ``i`` of a sample holds aux state ``g_i``. At TTT step ``t`` its input token is ``x_{i+1+t}``, its RoPE position is
``i + t``, and its teacher is the distribution that the target computed at position ``i + 1 + t`` (which predicts
``x_{i+2+t}``). The loss mask is shifted like ids and targets, once before the loop and once more after each step, so
step ``t`` scores row ``i`` exactly when token ``x_{i+1+t}`` is loss-masked:

    teachers of step t = { p : loss_mask[p], p >= 1 + t },   student row of teacher p = p - 1 - t

In words: what follows a loss-masked token is learnt. That is what a server asks of a draft, whose first guess is the
*second* answer token (the target's own prefill yields the first) and whose last is what follows the newest token.

Most rows need less than a full decoder layer. *Context* rows only give keys and values to block 0; *active* rows, those
that some step scores, run the whole layer. Everything row-wise works on packed rows, so neither padding nor prompts
cost more than their keys and values; attention alone sees a padded [B, S] tensor. Nothing here depends on the device,
and nothing in the loop has to ask a tensor for its contents.

Shapes: B batch, S padded length, C context rows, R active rows (a subset of C), N teachers, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TTTRows:
    """Row indices of one batch. ``*_flat`` index the flattened [B * S]. Any of C, R and N may be 0."""

    context_flat_C: Tensor
    """Rows up to each sample's last active one."""
    active_flat_R: Tensor
    active_in_context_R: Tensor
    """Where each active row lies among the context rows."""
    active_offset_R: Tensor
    """Position of each active row in its own sample."""
    teacher_flat_N: Tensor
    """Loss-masked positions with at least one student."""
    student_TN: Tensor
    """Active row that step t scores against teacher n; 0 where there is none."""
    scored_TN: Tensor
    """Whether step t has a student for teacher n (p >= 1 + t)."""

    @classmethod
    def plan(cls, loss_mask_BS: Tensor, ttt_length: int) -> TTTRows:
        """Plan a batch whose mask is False on padding. The mask must live on the CPU."""
        assert loss_mask_BS.device.type == "cpu" and loss_mask_BS.dtype == torch.bool
        length = loss_mask_BS.shape[1]
        teacher_mask_BS = loss_mask_BS.clone()
        teacher_mask_BS[:, :1] = False
        active_BS = torch.zeros_like(loss_mask_BS)
        for t in range(ttt_length):
            active_BS[:, : max(length - 1 - t, 0)] |= loss_mask_BS[:, 1 + t :]
        context_BS = active_BS.flip(1).cumsum(1).flip(1) > 0

        context_flat_C = context_BS.flatten().nonzero().squeeze(1)
        active_flat_R = active_BS.flatten().nonzero().squeeze(1)
        teacher_flat_N = teacher_mask_BS.flatten().nonzero().squeeze(1)
        context_rank_BS = context_BS.flatten().cumsum(0) - 1
        active_rank_BS = active_BS.flatten().cumsum(0) - 1
        shift_T1 = 1 + torch.arange(ttt_length).unsqueeze(1)
        scored_TN = teacher_flat_N % length >= shift_T1
        student_TN = active_rank_BS[(teacher_flat_N - shift_T1).clamp(min=0)].where(scored_TN, 0)
        return cls(
            context_flat_C=context_flat_C,
            active_flat_R=active_flat_R,
            active_in_context_R=context_rank_BS[active_flat_R],
            active_offset_R=active_flat_R % length,
            teacher_flat_N=teacher_flat_N,
            student_TN=student_TN,
            scored_TN=scored_TN,
        )

    def to(self, device: torch.device) -> TTTRows:
        return TTTRows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
