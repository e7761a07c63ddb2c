"""Layers that drafts share, with the parameter names of Llama-like checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchspec.target.shape import TargetShape


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (arXiv 1910.07467), weight and result in the dtype of the input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class PartNorms(nn.ModuleList):
    """An :class:`RMSNorm` of its own for each of ``parts`` equal parts of the last dimension."""

    def __init__(self, parts: int, size: int, eps: float):
        super().__init__(RMSNorm(size, eps) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(part) for norm, part in zip(self, x.chunk(len(self), dim=-1), strict=True)], dim=-1)


class AttentionProjections(nn.Module):
    """Of ``inputs`` features to queries, keys and values, and of what the heads found back to the hidden size."""

    def __init__(self, target: TargetShape, inputs: int):
        super().__init__()
        queries, keys = target.widths
        self.q_proj = nn.Linear(inputs, queries, bias=False)
        self.k_proj = nn.Linear(inputs, keys, bias=False)
        self.v_proj = nn.Linear(inputs, keys, bias=False)
        self.o_proj = nn.Linear(queries, target.hidden_size, bias=False)
        self.num_kv_heads, self.head_dim = target.num_kv_heads, target.head_dim

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """[R, heads, E] of the rows' features."""
        return projection(x).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
