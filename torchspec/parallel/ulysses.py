"""Ulysses: an all-to-all between "my rows, all heads" and "all rows, my heads" (DeepSpeed-Ulysses, arXiv 2309.14509).

    rank u holds rows R_u of heads 0..H-1  --split_heads-->  rows of all U ranks, heads u*H/U .. (u+1)*H/U - 1
                                           <--join_heads---

An all-to-all needs as many rows from every rank, so rows are
padded with zeros to a number that all ranks know; nothing depends on what a rank's own rows are.

Shapes: R rows here, M rows a rank after padding (R <= M), U ranks, H heads, E width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_heads(x_RHE: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """[R, H, E] to [U * M, H / U, E], the rows of rank 0 first; ``rows`` is M. Differentiable."""
    ranks, heads = group.size(), x_RHE.shape[1]
    sent = x_RHE.new_zeros(ranks, rows, heads // ranks, x_RHE.shape[2])
    sent[:, : len(x_RHE)] = x_RHE.unflatten(1, (ranks, -1)).transpose(0, 1)
    return _AllToAll.apply(sent, group).flatten(0, 1)


def join_heads(x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """[U * M, H / U, E] to [R, H, E]; ``rows`` is R. Differentiable."""
    received = _AllToAll.apply(x.unflatten(0, (group.size(), -1)), group)
    return received[:, :rows].transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Part v of rank u becomes part u of rank v. Its own adjoint, so the gradients go the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _exchange(dx, ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
