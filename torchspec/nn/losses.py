"""Cross-entropy of a draft's head against a teacher, fused with the projections.

A *teacher* is a position of the target: a distribution over tokens. A *student* is a row of the draft's hidden states
that is scored against one, as the guess for the draft's position k: a teacher has as many students as guesses were made
for its token. One custom autograd function walks over chunks of students, cut between teachers. For each chunk it makes
the target's logits once, then the students', turns these in place into the gradient of the loss, and
takes the gradients of the hidden states and of the head from it *in the forward pass*, as Liger's fused linear
cross-entropy does. At no time do logits exist for more than one chunk, and a head that is not trained costs nothing.

A teacher counts when its first choice is in the draft's vocabulary. Accuracy asks whether the draft's first choice is
the teacher's.

Matmuls run in the autocast dtype where autocast is on; everything else, and every sum, in float32 (float64 for
float64 inputs).

Shapes: R rows, M students, m students of a chunk, N teachers, n teachers of a chunk, K positions, H hidden size,
D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_ELEMENTS = 2**19
"""Logits worked on at once on a CPU (2 MiB), so that the passes over them stay in its cache."""
KERNEL_ELEMENTS = 2**26
"""The same elsewhere (256 MiB), so that a pass keeps a device busy and its operands small."""


def soft_cross_entropy(z_MD: Tensor, p_MD: Tensor) -> Tensor:
    """loss_M, and z becomes d loss / d z in place: the difference between ``softmax(z)`` and ``p``.

    Args:
        z_MD: logits of students, of which the largest in each row is 0.
        p_MD: probabilities of their teachers; both are in the accumulating dtype.
    """
    expected_M = (p_MD * z_MD).sum(-1)
    total_M1 = z_MD.exp_().sum(-1, keepdim=True)
    z_MD.mul_(total_M1.reciprocal()).sub_(p_MD)
    return total_M1.squeeze(1).log() - expected_M


class LossSums(NamedTuple):
    """Sums over students. Only ``total`` is differentiable."""

    total: Tensor
    """Scalar: sum over k of ``weights[k] * loss_K[k]``."""
    loss_K: Tensor
    counted_K: Tensor
    supervised_K: Tensor
    """All students, whether their teachers count or not."""
    correct_K: Tensor


class Students(NamedTuple):
    """Who is scored against whom. On the CPU, where chunks are cut without a device sync."""

    row_M: Tensor
    """Which row of the hidden states it is; each at most once."""
    teacher_M: Tensor
    """Index of its teacher, increasing."""
    position_M: Tensor

    def chunks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Slices of students, about ``size`` each and with all students of their teachers, and those of the teachers.

        Teachers without a student make chunks larger than need be.
        """
        start = 0
        while start < len(self.teacher_M):
            stop = int(torch.searchsorted(self.teacher_M, self.teacher_M[start : start + size][-1], right=True))
            yield slice(start, stop), slice(int(self.teacher_M[start]), int(self.teacher_M[stop - 1]) + 1)
            start = stop


class Targets(NamedTuple):
    """What a chunk of teachers says."""

    probabilities: Callable[[Tensor], Tensor]
    """p_mD of the teachers with these indices."""
    choice_n: Tensor
    """Index of the largest probability in the draft's vocabulary."""
    counted_n: Tensor


class Teacher(Protocol):
    def chunk(self, rows: slice, dtype: torch.dtype) -> Targets:
        """Those of the N teachers. ``dtype`` is that of matmuls."""


class SoftTeacher(NamedTuple):
    """The target's distribution, renormalised over the draft's vocabulary."""

    hidden_NH: Tensor
    """After the target's final norm."""
    draft_head_DH: Tensor
    rest_head_XH: Tensor
    """The V - D rows that are not in the draft vocabulary."""
    cap: float | None = None
    """c of a soft cap of the logits, ``c * tanh(logits / c)``."""

    def chunk(self, rows: slice, dtype: torch.dtype) -> Targets:
        hidden_nH = self.hidden_NH[rows].to(dtype)
        p_nD = accumulating(F.linear(hidden_nH, self.draft_head_DH.to(dtype)))
        best_n, choice_n = p_nD.max(-1)
        counted_n = torch.ones_like(best_n, dtype=torch.bool)
        if len(self.rest_head_XH):
            rest_nX = F.linear(hidden_nH, self.rest_head_XH.to(dtype))
            counted_n = best_n >= rest_nX.amax(-1)
        if self.cap is not None:  # leaves the order as it is
            p_nD, best_n = (x.div_(self.cap).tanh_().mul_(self.cap) for x in (p_nD, best_n))
        for block in _row_blocks(p_nD):
            p = p_nD[block].sub_(best_n[block].unsqueeze(1)).exp_()
            p.mul_(p.sum(-1, keepdim=True).reciprocal_())
        return Targets(p_nD.__getitem__, choice_n, counted_n)


class HardTeacher(NamedTuple):
    """The true tokens, for a draft over the target's whole vocabulary of V."""

    token_N: Tensor
    """int64."""
    vocab_size: int

    def chunk(self, rows: slice, dtype: torch.dtype) -> Targets:
        choice_n = self.token_N[rows]

        def probabilities(index_m: Tensor) -> Tensor:
            p_mD = torch.zeros(len(index_m), self.vocab_size, device=index_m.device)
            return p_mD.scatter_(1, choice_n[index_m].unsqueeze(1), 1.0)

        return Targets(probabilities, choice_n, torch.ones_like(choice_n, dtype=torch.bool))


def accumulating(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums are taken in: float32, or float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype of the device of ``x`` where autocast is on, else the dtype of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _row_blocks(z_MD: Tensor) -> list[slice]:
    """Slices of rows to work on one after the other."""
    elements = CACHE_ELEMENTS if z_MD.device.type == "cpu" else KERNEL_ELEMENTS
    step = max(1, elements // z_MD.shape[1])
    return [slice(start, start + step) for start in range(0, len(z_MD), step)]


def _score_(z_mD: Tensor, targets: Targets, index_m: Tensor) -> tuple[Tensor, Tensor]:
    """Turn students' logits into the gradient of their losses, in place.

    Args:
        index_m: each student's teacher in ``targets``.

    Returns:
        loss_m, in the accumulating dtype, and correct_m (bool).
    """
    losses, corrects = [], []
    for block in _row_blocks(z_mD):
        z, index = z_mD[block], index_m[block]
        x = accumulating(z)
        best, choice = x.max(-1, keepdim=True)
        corrects.append(choice.squeeze(1) == targets.choice_n[index])
        losses.append(soft_cross_entropy(x.sub_(best), targets.probabilities(index)))
        if x is not z:
            z.copy_(x)
    return torch.cat(losses), torch.cat(corrects)


class FusedCrossEntropy(torch.autograd.Function):
    """See :func:`fused_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        head_DH: Tensor,
        teacher: Teacher,
        students: Students,
        weight_K: Tensor,
        chunk: int,
        dtype: torch.dtype,
        trained: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        hidden_trained, head_trained = trained
        sums_4K = weight_K.new_zeros(4, len(weight_K))
        dhidden_RH = torch.zeros_like(hidden_RH) if hidden_trained else None
        dhead_DH = torch.zeros_like(head_DH, dtype=weight_K.dtype) if head_trained else None
        head = head_DH.to(dtype)
        row_M, teacher_M, position_M = (x.to(hidden_RH.device, non_blocking=True) for x in students)
        for block, teachers in students.chunks(chunk):
            targets = teacher.chunk(teachers, dtype)
            row_m, index_m, position_m = row_M[block], teacher_M[block] - teachers.start, position_M[block]
            hidden_mH = hidden_RH[row_m].to(dtype)
            z_mD = F.linear(hidden_mH, head)
            loss_m, correct_m = _score_(z_mD, targets, index_m)
            counted_m = targets.counted_n[index_m].to(loss_m.dtype)
            figures = counted_m * loss_m, counted_m, torch.ones_like(counted_m), counted_m * correct_m
            sums_4K.index_add_(1, position_m, torch.stack(figures))
            weight_m1 = (counted_m * weight_K[position_m]).unsqueeze(1)
            if dhidden_RH is not None:
                dhidden_RH.index_copy_(0, row_m, ((z_mD @ head) * weight_m1).to(dhidden_RH.dtype))
            if dhead_DH is not None:
                _add_outer_(dhead_DH, z_mD, (hidden_mH * weight_m1).to(dtype))
            del z_mD, targets  # before the next chunk's are made
        sums = sums_4K.unbind()
        ctx.mark_non_differentiable(*sums)
        ctx.save_for_backward(dhidden_RH, dhead_DH)
        ctx.head_dtype = head_DH.dtype
        return sums[0] @ weight_K, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_RH, dhead_DH = ctx.saved_tensors
        dhidden = None if dhidden_RH is None else dhidden_RH * dtotal.to(dhidden_RH.dtype)
        dhead = None if dhead_DH is None else (dhead_DH * dtotal).to(ctx.head_dtype)
        return dhidden, dhead, None, None, None, None, None, None


def _add_outer_(sum_DH: Tensor, z_mD: Tensor, hidden_mH: Tensor) -> None:
    """sum += z^T hidden, the sum in its own (higher) precision."""
    if z_mD.dtype == sum_DH.dtype:
        sum_DH.addmm_(z_mD.t(), hidden_mH)
    else:
        sum_DH += z_mD.t() @ hidden_mH


def fused_cross_entropy(
    hidden_RH: Tensor, head_DH: Tensor, teacher: Teacher, students: Students, weights: Sequence[float], chunk: int
) -> LossSums:
    """Un-normalised loss of all students, differentiable in ``hidden_RH`` and in ``head_DH``.

    Args:
        hidden_RH: the draft's hidden states (after its norm).
        head_DH: the draft's head, or a frozen one of the target's.
        weights: of each of the K positions in ``total``.
        chunk: logits of about so many students exist at the same time.

    Without grad mode nothing is computed for a backward.
    """
    grad = torch.is_grad_enabled()
    trained = grad and hidden_RH.requires_grad, grad and head_DH.requires_grad
    dtype = compute_dtype(hidden_RH)
    weight_K = torch.tensor(weights, dtype=accumulating(hidden_RH[:0]).dtype, device=hidden_RH.device)
    with torch.autocast(hidden_RH.device.type, enabled=False):  # autocast would take the sums in low precision
        return LossSums(
            *FusedCrossEntropy.apply(hidden_RH, head_DH, teacher, students, weight_K, chunk, dtype, trained)
        )
