"""Attention of a chain of guesses: block-0 flash attention plus diagonal terms, exactly.

A row guesses several tokens, position 0 first. For position t it attends causally to the keys of position 0 (*block 0*)
and to one key per later position, its own (*diagonal* terms 1..t). So do EAGLE3's training-time test, step by step, and
P-EAGLE, all positions at once. Writing l_0, O_0 for the log-sum-exp and output of block 0:

    l_j = E^-1/2 * q . k_j       L = logsumexp(l_0, l_1, .., l_t)        w_j = exp(l_j - L)
    O   = w_0 O_0 + sum_j w_j v_j

The backward of block 0 is the flash backward called with the *merged* O and L, which already holds the cross terms;
the diagonal part is dv_j = w_j dO and dl_j = w_j dO . (v_j - O). No [S, S + t] matrix is ever made.
Source: SpecForge's attention for EAGLE3 and the context-parallel EAGLE3 pull requests (TorchSpec 93, ModelOpt 745).

The diagonal terms work on packed rows. Block 0 is behind a :class:`Kernel`, because it alone knows where keys lie: in
right-padded [B, S] tensors where samples are whole (:class:`PaddedKernel`; padding needs no mask there: under a causal
mask a padded key comes after every valid row), or around a ring where they are sharded (``parallel/ring.py``).

Shapes: B batch, S padded length, R packed rows, J diagonal terms, Q query heads, K key/value heads (Q % K == 0),
E head dimension. Log-sum-exps are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec.nn.flash import block_attention, block_attention_backward, logit_scale, scatter_rows


def merge_diagonal(
    o_RQE: Tensor, lse_RQ: Tensor, q_RQE: Tensor, keys_RKE: Sequence[Tensor], values_RKE: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add each row's diagonal terms to an attention that already has ``o`` and ``lse``.

    Returns:
        The merged o_RQE (dtype of ``lse``), the merged lse_RQ, and the diagonal weights w_JRQ.
    """
    q, scale = _grouped(q_RQE.to(lse_RQ.dtype), keys_RKE[0]), logit_scale(q_RQE)
    logits = [lse_RQ] + [(q * k.unsqueeze(2)).sum(-1).flatten(1) * scale for k in keys_RKE]
    logits_JRQ = torch.stack(logits)
    merged_lse_RQ = logits_JRQ.logsumexp(0)
    w_JRQ = (logits_JRQ - merged_lse_RQ).exp_()
    merged_o_RQE = o_RQE * w_JRQ[0].unsqueeze(-1)
    o = _grouped(merged_o_RQE, keys_RKE[0])
    for w_RQ, v in zip(w_JRQ[1:], values_RKE, strict=True):
        o.addcmul_(w_RQ.view(o.shape[:3]).unsqueeze(-1), v.unsqueeze(2).to(o.dtype))
    return merged_o_RQE, merged_lse_RQ, w_JRQ[1:]


def merge_diagonal_backward(
    do_RQE: Tensor,
    o_RQE: Tensor,
    q_RQE: Tensor,
    keys_RKE: Sequence[Tensor],
    values_RKE: Sequence[Tensor],
    w_JRQ: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of the diagonal terms; ``o`` is the merged output.

    Returns:
        The diagonal terms' share of dq_RQE, and per term dk_RKE and dv_RKE.
    """
    do, q = (_grouped(x.to(w_JRQ.dtype), keys_RKE[0]) for x in (do_RQE, q_RQE))
    delta = (do * _grouped(o_RQE, keys_RKE[0])).sum(-1, keepdim=True)
    dq, scale = torch.zeros_like(q), logit_scale(q_RQE)
    dks, dvs = [], []
    for k, v, w_RQ in zip(keys_RKE, values_RKE, w_JRQ, strict=True):
        w = w_RQ.view(do.shape[:3]).unsqueeze(-1)
        dlogit = ((do * v.unsqueeze(2)).sum(-1, keepdim=True) - delta) * w * scale
        dq.addcmul_(dlogit, k.unsqueeze(2).to(dq.dtype))
        dks.append((dlogit * q).sum(2).to(k.dtype))
        dvs.append((w * do).sum(2).to(v.dtype))
    return dq.flatten(1, 2), dks, dvs


def _grouped(x_RQE: Tensor, k_RKE: Tensor) -> Tensor:
    """View query heads as [R, K, Q // K, E], next to the key/value head they share."""
    kv_heads = k_RKE.shape[1]
    return x_RQE.unflatten(1, (kv_heads, x_RQE.shape[1] // kv_heads))


class Kernel(Protocol):
    """How queries attend to block 0, which a subclass keeps in tensors of its own making."""

    def attend(self, q_RQE: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """o_RQE, and lse_RQ in at least float32."""

    def gradients(
        self, do_RQE: Tensor, q_RQE: Tensor, o_RQE: Tensor, lse_RQ: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """dq_RQE and one gradient for each of ``tensors``; ``o`` and ``lse`` are the merged ones."""


class Block0(NamedTuple):
    """Block 0 of a micro-batch, the same for all positions."""

    kernel: Kernel
    tensors: tuple[Tensor, ...]
    """Arguments of the kernel, through which gradients reach the keys and values."""


class PaddedKernel:
    """Block 0 in right-padded tensors, all of it here. Tensors: k_BSKE, v_BSKE, and rows_R, where each query lies."""

    def attend(self, q_RQE: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        k_BSKE, v_BSKE, rows_R = tensors
        o_BSQE, lse_BSQ = block_attention(_padded(q_RQE, rows_R, k_BSKE), k_BSKE, v_BSKE)
        return o_BSQE.flatten(0, 1)[rows_R], lse_BSQ.flatten(0, 1)[rows_R]

    def gradients(
        self, do_RQE: Tensor, q_RQE: Tensor, o_RQE: Tensor, lse_RQ: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        k_BSKE, v_BSKE, rows_R = tensors
        do, q, o, lse = (_padded(x, rows_R, k_BSKE) for x in (do_RQE, q_RQE, o_RQE, lse_RQ))
        dq_BSQE, dk, dv = block_attention_backward(do, q, k_BSKE, v_BSKE, o, lse)
        return dq_BSQE.flatten(0, 1)[rows_R], (dk, dv, None)


def _padded(x_R: Tensor, rows_R: Tensor, like_BS: Tensor) -> Tensor:
    shape_BS = like_BS.shape[:2]
    return scatter_rows(x_R, rows_R, shape_BS.numel()).unflatten(0, shape_BS)


class ChainAttention(torch.autograd.Function):
    """One position's attention of packed query rows, with its exact backward. See :func:`chain_attention`."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, in_block0: int, q_RQE: Tensor, *tensors: Tensor) -> Tensor:
        block0, keys, values = _split(tensors, in_block0)
        o_RQE, lse_RQ = kernel.attend(q_RQE, block0)
        w_JRQ = lse_RQ.new_empty(0)
        if keys:
            o_RQE, lse_RQ, w_JRQ = merge_diagonal(o_RQE, lse_RQ, q_RQE, keys, values)
        ctx.save_for_backward(q_RQE, o_RQE, lse_RQ, w_JRQ, *tensors)
        ctx.kernel, ctx.in_block0 = kernel, in_block0
        return o_RQE.to(q_RQE.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_RQE: Tensor) -> tuple[Tensor | None, ...]:
        q_RQE, o_RQE, lse_RQ, w_JRQ, *tensors = ctx.saved_tensors
        block0, keys, values = _split(tensors, ctx.in_block0)
        o_low_RQE = o_RQE.to(q_RQE.dtype)
        dq_RQE, dblock0 = ctx.kernel.gradients(do_RQE, q_RQE, o_low_RQE, lse_RQ, block0)
        dks: list[Tensor] = []
        dvs: list[Tensor] = []
        if keys:
            dq_diagonal, dks, dvs = merge_diagonal_backward(do_RQE, o_RQE, q_RQE, keys, values, w_JRQ)
            dq_RQE = dq_RQE.to(dq_diagonal.dtype).add_(dq_diagonal)
        return None, None, dq_RQE.to(q_RQE.dtype), *dblock0, *dks, *dvs


def _split(tensors: Sequence[Tensor], in_block0: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Those of block 0, and the diagonal keys and values, which are as many."""
    values = (in_block0 + len(tensors)) // 2
    return tensors[:in_block0], tensors[in_block0:values], tensors[values:]


def chain_attention(
    q_RQE: Tensor, block0: Block0, keys_RKE: Sequence[Tensor] = (), values_RKE: Sequence[Tensor] = ()
) -> Tensor:
    """Attention for position ``len(keys_RKE)``, differentiable in every float input.

    Args:
        q_RQE: queries of the rows.
        block0: keys and values of position 0; the same for every position.
        keys_RKE: keys of positions 1..t, one tensor each, for the same rows. ``values_RKE`` likewise.

    Returns:
        o_RQE in the dtype of ``q_RQE``.
    """
    assert len(keys_RKE) == len(values_RKE)
    tensors = *block0.tensors, *keys_RKE, *values_RKE
    output: Tensor = ChainAttention.apply(block0.kernel, len(block0.tensors), q_RQE, *tensors)
    return output
