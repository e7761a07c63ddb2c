"""Attention of EAGLE3's training-time test (TTT): block-0 flash attention plus diagonal terms, exactly.

At TTT step t a row attends causally to the keys of step 0 (*block 0*) and to one key per later step, its own
(*diagonal* terms 1..t). Writing l_0, O_0 for the log-sum-exp and output of block 0:

    l_j = scale * q . k_j        L = logsumexp(l_0, l_1, .., l_t)        w_j = exp(l_j - L)
    O   = w_0 O_0 + sum_j w_j v_j

The backward of block 0 is the flash backward called with the *merged* O and L, which already holds the cross terms;
the diagonal part is dv_j = w_j dO and dl_j = w_j dO . (v_j - O). No [S, S + t] matrix is ever made.
Source: SpecForge's TTT attention and the context-parallel EAGLE3 pull requests (TorchSpec 93, ModelOpt 745).

Block 0 works on right-padded [B, S] tensors, the diagonal terms on packed rows. The two are separate functions because
only block 0 has anything to communicate when the sequence is sharded. Right padding needs no mask: under a causal mask
a padded key comes after every valid row.

Shapes: B batch, S padded length, R packed rows, J diagonal terms, Q query heads, K key/value heads (Q % K == 0),
E head dimension. Log-sum-exps are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CUDA_DTYPES = (torch.bfloat16, torch.float16)


def block_attention(q_BSQE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal flash attention that also returns its log-sum-exp.

    Returns:
        o_BSQE and lse_BSQ.

    Raises:
        ValueError: a CUDA tensor that is neither bfloat16 nor float16 (the flash kernels know no other type).
    """
    q, k, v = _heads_first(q_BSQE, k_BSKE, v_BSKE)
    if q.is_cuda:
        if q.dtype not in CUDA_DTYPES:
            raise ValueError(f"training.dtype: flash attention on CUDA needs bfloat16 or float16, got {q.dtype}")
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return o.transpose(1, 2), lse.transpose(1, 2)


def block_attention_backward(
    do_BSQE: Tensor, q_BSQE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, o_BSQE: Tensor, lse_BSQ: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of block 0 when its terms are part of a larger softmax with output ``o`` and log-sum-exp ``lse``.

    Returns:
        dq_BSQE, dk_BSKE, dv_BSKE.
    """
    q, k, v = _heads_first(q_BSQE, k_BSKE, v_BSKE)
    do, o, lse = do_BSQE.transpose(1, 2), o_BSQE.transpose(1, 2), lse_BSQ.transpose(1, 2)
    if q.is_cuda:
        length = q.shape[2]
        philox = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse.contiguous(), None, None, length, length, 0.0, True, philox, philox[:0], scale=scale
        )
    else:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, True, scale=scale
        )
    batch, length, kv_heads, width = k_BSKE.shape
    dk, dv = (g.transpose(1, 2).reshape(batch, length, kv_heads, -1, width).sum(3) for g in (dk, dv))
    return dq.transpose(1, 2), dk, dv


def _heads_first(q_BSQE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, S, E] views, with the key/value heads repeated: the kernels' backward wants one per query head."""
    repeats = q_BSQE.shape[2] // k_BSKE.shape[2]
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, dim=2) for x in (k_BSKE, v_BSKE))
    return q_BSQE.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def merge_diagonal(
    o_RQE: Tensor, lse_RQ: Tensor, q_RQE: Tensor, keys_RKE: Sequence[Tensor], values_RKE: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add each row's diagonal terms to an attention that already has ``o`` and ``lse``.

    Returns:
        The merged o_RQE (dtype of ``lse``), the merged lse_RQ, and the diagonal weights w_JRQ.
    """
    q = _grouped(q_RQE.to(lse_RQ.dtype), keys_RKE[0])
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
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of the diagonal terms; ``o`` is the merged output.

    Returns:
        The diagonal terms' share of dq_RQE, and per term dk_RKE and dv_RKE.
    """
    do, q = (_grouped(x.to(w_JRQ.dtype), keys_RKE[0]) for x in (do_RQE, q_RQE))
    delta = (do * _grouped(o_RQE, keys_RKE[0])).sum(-1, keepdim=True)
    dq = torch.zeros_like(q)
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


class TTTAttention(torch.autograd.Function):
    """One TTT step's attention of packed query rows, with its exact backward. See :func:`ttt_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_RQE: Tensor,
        k0_BSKE: Tensor,
        v0_BSKE: Tensor,
        rows_R: Tensor,
        scale: float,
        *diagonal: Tensor,
    ) -> Tensor:
        keys, values = diagonal[: len(diagonal) // 2], diagonal[len(diagonal) // 2 :]
        q_BSQE = _scatter_rows(q_RQE, rows_R, k0_BSKE)
        o_BSQE, lse_BSQ = block_attention(q_BSQE, k0_BSKE, v0_BSKE, scale)
        o_RQE, lse_RQ = o_BSQE.flatten(0, 1)[rows_R], lse_BSQ.flatten(0, 1)[rows_R]
        w_JRQ = lse_RQ.new_empty(0)
        if keys:
            o_RQE, lse_RQ, w_JRQ = merge_diagonal(o_RQE, lse_RQ, q_RQE, keys, values, scale)
        ctx.save_for_backward(q_RQE, k0_BSKE, v0_BSKE, rows_R, o_RQE, lse_RQ, w_JRQ, *diagonal)
        ctx.scale = scale
        return o_RQE.to(q_RQE.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_RQE: Tensor) -> tuple[Tensor | None, ...]:
        q_RQE, k0_BSKE, v0_BSKE, rows_R, o_RQE, lse_RQ, w_JRQ, *diagonal = ctx.saved_tensors
        keys, values = diagonal[: len(diagonal) // 2], diagonal[len(diagonal) // 2 :]
        do_BSQE, q_BSQE = (_scatter_rows(x, rows_R, k0_BSKE) for x in (do_RQE, q_RQE))
        o_BSQE, lse_BSQ = (_scatter_rows(x, rows_R, k0_BSKE) for x in (o_RQE.to(q_RQE.dtype), lse_RQ))
        dq_BSQE, dk0, dv0 = block_attention_backward(do_BSQE, q_BSQE, k0_BSKE, v0_BSKE, o_BSQE, lse_BSQ, ctx.scale)
        dq_RQE = dq_BSQE.flatten(0, 1)[rows_R]
        dks: list[Tensor] = []
        dvs: list[Tensor] = []
        if keys:
            dq_diagonal, dks, dvs = merge_diagonal_backward(do_RQE, o_RQE, q_RQE, keys, values, w_JRQ, ctx.scale)
            dq_RQE = dq_RQE.to(dq_diagonal.dtype).add_(dq_diagonal).to(q_RQE.dtype)
        return dq_RQE, dk0, dv0, None, None, *dks, *dvs


def _scatter_rows(x_R: Tensor, rows_R: Tensor, like_BS: Tensor) -> Tensor:
    """Put packed rows at their place in a padded [B, S, ..] tensor of zeros.

    A row that is not there has q = 0, lse = 0 and do = 0, all finite, and so adds nothing to any gradient.
    """
    batch, length = like_BS.shape[:2]
    return x_R.new_zeros(batch * length, *x_R.shape[1:]).index_copy_(0, rows_R, x_R).unflatten(0, (batch, length))


def ttt_attention(
    q_RQE: Tensor,
    k0_BSKE: Tensor,
    v0_BSKE: Tensor,
    rows_R: Tensor,
    keys_RKE: Sequence[Tensor] = (),
    values_RKE: Sequence[Tensor] = (),
    scale: float | None = None,
) -> Tensor:
    """Attention of TTT step ``len(keys_RKE)``, differentiable in every float input.

    Args:
        q_RQE: queries of the rows that the step computes.
        k0_BSKE: keys of step 0, right-padded; the same tensor in every step. ``v0_BSKE`` likewise.
        rows_R: where each row lies, as an index into the flattened [B * S].
        keys_RKE: keys of steps 1..t, one tensor a step, for the same rows. ``values_RKE`` likewise.
        scale: logit scale, by default ``E ** -0.5``.

    Returns:
        o_RQE in the dtype of ``q_RQE``.
    """
    assert len(keys_RKE) == len(values_RKE) and q_RQE.shape[1] % k0_BSKE.shape[2] == 0
    scale = q_RQE.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = TTTAttention.apply(q_RQE, k0_BSKE, v0_BSKE, rows_R, scale, *keys_RKE, *values_RKE)
    return output
