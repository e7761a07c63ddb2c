"""Ulysses: an all-to-all between "my rows, all heads" and "all rows, my heads" (DeepSpeed-Ulysses, arXiv 2309.14509).

    rank u holds rows R_u of heads 0..H-1  --split_heads-->  rows of all U ranks, heads u*H/U .. (u+1)*H/U - 1
                                           <--join_heads---

The two are each other's inverse and each other's adjoint. An all-to-all needs as many rows from every rank, so rows are
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
    output: Tensor = _SplitHeads.apply(x_RHE, rows, group)
    return output


def join_heads(x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """[U * M, H / U, E] to [R, H, E]; ``rows`` is R. Differentiable."""
    output: Tensor = _JoinHeads.apply(x, rows, group)
    return output


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RHE: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = len(x_RHE), group
        return _split(x_RHE, rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _join(dx, ctx.rows, ctx.group), None, None


class _JoinHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = len(x) // group.size(), group
        return _join(x, rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RHE: Tensor) -> tuple[Tensor, None, None]:
        return _split(dx_RHE, ctx.rows, ctx.group), None, None


def _split(x_RHE: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    ranks, heads = group.size(), x_RHE.shape[1]
    sent = x_RHE.new_zeros(ranks, rows, heads // ranks, x_RHE.shape[2])
    sent[:, : len(x_RHE)] = x_RHE.unflatten(1, (ranks, -1)).transpose(0, 1)
    return _all_to_all(sent, group).flatten(0, 1)


def _join(x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    received = _all_to_all(x.contiguous().unflatten(0, (group.size(), -1)), group)
    return received[:, :rows].transpose(0, 1).flatten(1, 2)


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
