"""The attention of a chain alone: against a softmax over an explicit mask, and where it could go wrong numerically."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchspec.nn.chain_attention import Block0, PaddedKernel, chain_attention, merge_diagonal
from torchspec.nn.flash import block_attention, block_attention_backward

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [(1, 1, 1, 1, 8), (2, 9, 2, 1, 8), (3, 17, 1, 4, 16), (2, 40, 3, 3, 64), (1, 300, 1, 2, 32)]
"""B, S, K, Q // K, E; 300 spans several of the flash kernel's blocks."""


def inputs(shape: tuple[int, ...], steps: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """q, k0, v0, keys of steps 1.., values of steps 1.. (leaves), and the rows: about two in three."""
    batch, length, kv_heads, group, width = shape
    generator = torch.Generator().manual_seed(sum(shape) + steps)
    active = torch.rand(batch * length, generator=generator) < 0.7
    active[0] = True
    rows_R = active.nonzero().squeeze(1)
    rows = len(rows_R)
    shapes = [(rows, kv_heads * group, width)] + [(batch, length, kv_heads, width)] * 2
    shapes += [(rows, kv_heads, width)] * (2 * (steps - 1))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for s in shapes]
    return [leaf.requires_grad_() for leaf in leaves], rows_R


def fast(leaves: list[Tensor], rows_R: Tensor) -> Tensor:
    q, k0, v0, *diagonal = leaves
    half = len(diagonal) // 2
    return chain_attention(q, Block0(PaddedKernel(), (k0, v0, rows_R)), diagonal[:half], diagonal[half:])


def dense(leaves: list[Tensor], rows_R: Tensor) -> Tensor:
    """Every query row against its own list of keys."""
    q, k0, v0, *diagonal = leaves
    half, length = len(diagonal) // 2, k0.shape[1]
    group = q.shape[1] // k0.shape[2]
    out = []
    for r, flat in enumerate(rows_R.tolist()):
        b, i = divmod(flat, length)
        keys = torch.cat([k0[b, : i + 1], *(k[r : r + 1] for k in diagonal[:half])]).repeat_interleave(group, 1)
        values = torch.cat([v0[b, : i + 1], *(v[r : r + 1] for v in diagonal[half:])]).repeat_interleave(group, 1)
        p = torch.softmax(torch.einsum("qe,nqe->qn", q[r], keys) / math.sqrt(q.shape[-1]), dim=-1)
        out.append(torch.einsum("qn,nqe->qe", p, values))
    return torch.stack(out)


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((output * weights.to(output.dtype)).sum(), leaves))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_dense_attention(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> None:
    leaves, rows_R = inputs(shape, steps, dtype)
    actual, expected = fast(leaves, rows_R), dense(leaves, rows_R)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])
    assert expected.abs().max() > 0.1
    for got, want in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * max(1.0, want.abs().max().item()))


def test_bfloat16_is_close_to_float32() -> None:
    leaves, rows_R = inputs((2, 40, 3, 3, 64), 4, torch.float32)
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    output = fast(low, rows_R)
    assert output.dtype == torch.bfloat16
    pairs = [(output, dense(leaves, rows_R))]
    pairs += zip(gradients(output, low), gradients(pairs[0][1], leaves), strict=True)
    for got, want in pairs:
        assert (got.float() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_extreme_logits_stay_exact(scale: float) -> None:
    """Logits of thousands: exp overflows unless the maximum of all terms is taken out first."""
    leaves, rows_R = inputs((2, 9, 2, 2, 8), 5, torch.float64, scale)
    actual, expected = fast(leaves, rows_R), dense(leaves, rows_R)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(1.0, want.abs().max().item()))


def test_keys_after_a_row_never_reach_it() -> None:
    """What right padding holds is irrelevant to every valid row, forward and backward, bit for bit."""
    leaves, _ = inputs((2, 20, 2, 2, 8), 3, torch.float32)
    valid = 12
    rows_R = torch.cat([torch.arange(valid), 20 + torch.arange(valid)])
    rows = len(rows_R)
    q, k0, v0, *diagonal = (x.detach() for x in leaves)
    kept = [q[:rows], k0, v0, *(x[:rows] for x in diagonal)]
    changed = [x.clone() for x in kept]
    changed[1][:, valid:], changed[2][:, valid:] = 1e4, -1e4
    results = []
    for tensors in (kept, changed):
        tensors = [x.requires_grad_() for x in tensors]
        output = fast(tensors, rows_R)
        results.append([output, *gradients(output, tensors)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    dk0, dv0 = results[1][2:4]
    assert dk0[:, valid:].abs().max() == 0
    assert dv0[:, valid:].abs().max() == 0
    assert dk0[:, :valid].abs().max() > 0


def test_merge_is_the_softmax_over_all_terms() -> None:
    """Half of the keys through block 0, half as diagonal terms, equals all of them in one softmax."""
    leaves, _ = inputs((1, 1, 1, 1, 8), 4, torch.float64)
    q, k, v = torch.randn(1, 1, 8, dtype=torch.float64), leaves[1].detach(), leaves[2].detach()
    o, lse = block_attention(q.unsqueeze(0), k, v)
    keys, values = ([torch.randn(1, 1, 8, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    merged, merged_lse, w_JRQ = merge_diagonal(o[0], lse[0], q, keys, values)
    logits = torch.stack([(q * key).sum() / math.sqrt(8) for key in [k[0], *keys]])
    p = logits.softmax(0)
    torch.testing.assert_close(merged[0, 0], sum(w * value.flatten() for w, value in zip(p, [v, *values], strict=True)))
    torch.testing.assert_close(merged_lse[0, 0], logits.logsumexp(0))
    torch.testing.assert_close(w_JRQ.flatten(), p[1:])


def test_backward_needs_the_merged_output() -> None:
    """With block 0's own output and log-sum-exp the gradient is wrong: what two other projects shipped."""
    leaves, rows_R = inputs((1, 17, 1, 2, 16), 3, torch.float64)
    wanted = gradients(dense(leaves, rows_R), leaves)[2]
    q, k0, v0, *_ = (x.detach() for x in leaves)
    q_BSQE = torch.zeros(1, 17, 2, 16, dtype=torch.float64)
    q_BSQE[0, rows_R] = q
    o, lse = block_attention(q_BSQE, k0, v0)
    do = torch.zeros_like(o)
    do[0, rows_R] = torch.randn(len(rows_R), 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    local = block_attention_backward(do, q_BSQE, k0, v0, o, lse)[2]
    assert (local - wanted).abs().max() > 0.01 * wanted.abs().max()
