"""Flash attention that also gives, and in its backward takes, the log-sum-exp: what softmaxes are merged by.

On a CPU and on CUDA these are torch's own flash kernels, called below autograd. A softmax over several blocks of keys
is merged from the blocks' outputs and log-sum-exps, and a block's backward is the kernel's, called with the *merged*
output and log-sum-exp.

Shapes: B batch, S length, L rows, Q query heads, K key/value heads (Q % K == 0), E head dimension. Log-sum-exps are
float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUDA_DTYPES = (torch.bfloat16, torch.float16)


def logit_scale(q: Tensor) -> float:
    """What the products of queries [.., E] and keys are multiplied by."""
    return q.shape[-1] ** -0.5


def scatter_rows(x_R: Tensor, slot_R: Tensor, slots: int) -> Tensor:
    """Rows [R, ..] at their slots [slots, ..], zeros elsewhere: as queries, zeros add nothing to any gradient."""
    return x_R.new_zeros(slots, *x_R.shape[1:]).index_copy_(0, slot_R, x_R)


def block_attention(q_BSQE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Flash attention that also returns its log-sum-exp.

    Args:
        causal: query i sees the keys 0..i; there must be as many keys as queries. Else it sees all of them.

    Returns:
        o_BSQE and lse_BSQ; nothing for an empty batch, which the kernels refuse.

    Raises:
        ValueError: a CUDA tensor that is neither bfloat16 nor float16 (the flash kernels know no other type).
    """
    if len(q_BSQE) == 0:
        return q_BSQE, q_BSQE[..., 0]
    q, k, v = _heads_first(q_BSQE, k_BSKE, v_BSKE)
    scale = logit_scale(q)
    if q.is_cuda:
        if q.dtype not in CUDA_DTYPES:
            raise ValueError(f"training.dtype: flash attention on CUDA needs bfloat16 or float16, got {q.dtype}")
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return o.transpose(1, 2), lse.transpose(1, 2)


def block_attention_backward(
    do_BSQE: Tensor,
    q_BSQE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    o_BSQE: Tensor,
    lse_BSQ: Tensor,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of block 0 when its terms are part of a larger softmax with output ``o`` and log-sum-exp ``lse``.

    Returns:
        dq_BSQE, dk_BSKE, dv_BSKE.
    """
    if len(q_BSQE) == 0:
        return q_BSQE, k_BSKE, v_BSKE
    q, k, v = _heads_first(q_BSQE, k_BSKE, v_BSKE)
    do, o, lse = (x.transpose(1, 2) for x in (do_BSQE, o_BSQE, lse_BSQ))
    scale = logit_scale(q)
    if q.is_cuda:
        lengths = None, None, q.shape[2], k.shape[2]  # all samples are as long
        philox = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse.contiguous(), *lengths, 0.0, causal, philox, philox[:0], scale=scale
        )
    else:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
    batch, length, kv_heads, width = k_BSKE.shape
    dk, dv = (g.transpose(1, 2).reshape(batch, length, kv_heads, -1, width).sum(3) for g in (dk, dv))
    return dq.transpose(1, 2), dk, dv


def merge_(o_LQE: Tensor, lse_LQ: Tensor, part_o_LQE: Tensor, part_lse_LQ: Tensor) -> None:
    """Add another part of the same softmax, in place. An empty softmax has ``lse`` -inf; the part is never empty."""
    share_LQ = torch.sigmoid(part_lse_LQ - lse_LQ)
    o_LQE.lerp_(part_o_LQE.to(o_LQE.dtype), share_LQ.unsqueeze(-1))
    torch.logaddexp(lse_LQ, part_lse_LQ, out=lse_LQ)


def _heads_first(q_BSQE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, S, E] views, with the key/value heads repeated: the kernels' backward wants one per query head."""
    repeats = q_BSQE.shape[2] // k_BSKE.shape[2]
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, dim=2) for x in (k_BSKE, v_BSKE))
    return q_BSQE.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
