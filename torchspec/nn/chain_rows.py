"""Which rows a draft works on that guesses a chain of tokens: decided once per batch, on the CPU, from the loss mask.

Row ``i`` of a sample holds aux state ``g_i`` and guesses position after position. For position ``t`` its RoPE position
is ``i + t``, its input token ``x_{i+1+t}`` (where the draft is fed with the tokens that it guesses), and its teacher
the distribution that the target computed at position ``i + 1 + t`` (which predicts ``x_{i+2+t}``). The loss mask is
shifted like ids and targets, so row ``i`` is scored for position ``t`` exactly when ``x_{i+1+t}`` is loss-masked:

    teachers for t = { p : loss_mask[p], p >= 1 + t },   student row of teacher p = p - 1 - t

In words: what follows a loss-masked token is learnt. That is what a server asks of a draft, whose first guess is the
*second* answer token (the target's own prefill yields the first) and whose last is what follows the newest token.

Most rows need less than a full decoder layer. *Context* rows only give keys and values to block 0; *active* rows, those
that some position scores, run the whole layer. Everything row-wise works on packed rows, so neither padding nor prompts
cost more than their keys and values; attention alone sees more than them. Nothing here depends on the device,
and nothing in the loop has to ask a tensor for its contents.

The plan is made on *windows*: rows of a padded batch that each hold a run of positions of one sample. Where samples are
whole, a window is a sample. Where they are sharded, it is a segment and its halo (``shards.py``): the columns
of the halo are read as tokens and teachers, but are neither context nor active, which another rank sees to.

Shapes: B windows, S columns, C context rows, R active rows (a subset of C), N teachers, T positions, M pairs of a
position and a teacher, P angles.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torchspec.nn.losses import Students


def active_rows(loss_mask_BS: Tensor, num_positions: int) -> Tensor:
    """bool [B, S]: the rows of whole samples that some position scores. The mask is False on padding."""
    length = loss_mask_BS.shape[1]
    active_BS = torch.zeros_like(loss_mask_BS)
    for t in range(num_positions):
        active_BS[:, : max(length - 1 - t, 0)] |= loss_mask_BS[:, 1 + t :]
    return active_BS


def context_lengths(active_BS: Tensor) -> Tensor:
    """int64 [B]: how many rows of each whole sample are context, those up to its last active one."""
    return (active_BS * torch.arange(1, active_BS.shape[1] + 1)).amax(1)


@dataclass(frozen=True, slots=True)
class ChainRows:
    """Row indices of one batch. ``*_flat`` index the flattened [B * S]. Any of C, R and N may be 0."""

    context_flat_C: Tensor
    context_angle_C: Tensor
    """Index of each context row's position into ``position_P``."""
    active_flat_R: Tensor
    active_in_context_R: Tensor
    """Where each active row lies among the context rows."""
    active_angle_R: Tensor
    """Index of each active row's position into ``position_P``; that of the position t further on is greater by t."""
    teacher_flat_N: Tensor
    """Loss-masked positions with at least one student."""
    students: Students
    """What is scored: row ``t * R + r`` is active row r for position t. Stays on the CPU."""
    position_P: Tensor
    """Positions whose rotary angles the rows use."""

    @classmethod
    def plan(cls, loss_mask_BS: Tensor, num_positions: int) -> ChainRows:
        """Plan a batch of whole samples whose mask is False on padding. The mask must live on the CPU."""
        active_BS = active_rows(loss_mask_BS, num_positions)
        start_B = torch.zeros(len(loss_mask_BS), dtype=torch.int64)
        return cls.of_windows(loss_mask_BS, active_BS, context_lengths(active_BS), start_B, num_positions)

    @classmethod
    def of_windows(
        cls, loss_mask_BS: Tensor, active_BS: Tensor, context_B: Tensor, start_B: Tensor, num_positions: int
    ) -> ChainRows:
        """Plan windows, on the CPU.

        Args:
            loss_mask_BS: the mask at each window's positions, halo included, False on padding.
            active_BS: the active rows that are this window's own.
            context_B: how many leading columns of each window are context rows.
            start_B: position of each window's first column.
        """
        assert loss_mask_BS.device.type == "cpu" and loss_mask_BS.dtype == torch.bool
        length = loss_mask_BS.shape[1]
        context_BS = torch.arange(length) < context_B.unsqueeze(1)
        teacher_mask_BS = loss_mask_BS.clone()
        teacher_mask_BS[:, :1] = False

        context_flat_C = context_BS.flatten().nonzero().squeeze(1)
        active_flat_R = active_BS.flatten().nonzero().squeeze(1)
        teacher_flat_N = teacher_mask_BS.flatten().nonzero().squeeze(1)
        context_rank_BS = context_BS.flatten().cumsum(0) - 1
        active_rank_BS = active_BS.flatten().cumsum(0) - 1
        shift_T = 1 + torch.arange(num_positions)
        student_flat_NT = (teacher_flat_N.unsqueeze(1) - shift_T).clamp(min=0)
        scored_NT = (teacher_flat_N.unsqueeze(1) % length >= shift_T) & active_BS.flatten()[student_flat_NT]
        teacher_M, position_M = scored_NT.nonzero().unbind(1)
        row_M = position_M * len(active_flat_R) + active_rank_BS[student_flat_NT[scored_NT]]

        table_start, table_B = start_B.unique(return_inverse=True)  # windows that start together share their angles
        width = length + num_positions
        angle_BS = (table_B * width).unsqueeze(1) + torch.arange(length)
        return cls(
            context_flat_C=context_flat_C,
            context_angle_C=angle_BS.flatten()[context_flat_C],
            active_flat_R=active_flat_R,
            active_in_context_R=context_rank_BS[active_flat_R],
            active_angle_R=angle_BS.flatten()[active_flat_R],
            teacher_flat_N=teacher_flat_N,
            students=Students(row_M, teacher_M, position_M),
            position_P=(table_start.unsqueeze(1) + torch.arange(width)).flatten(),
        )

    def to(self, device: torch.device) -> ChainRows:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved |= {name: x.to(device, non_blocking=True) for name, x in moved.items() if isinstance(x, Tensor)}
        return ChainRows(**moved)
