"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split layout of Llama checkpoints.

Angles are computed in float64 and rounded once: true positions stay exact however long the sequence is.
Shapes: P positions, R rows, Q heads, E head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchspec.target.shape import TargetShape


def rotary_table(target: TargetShape, positions_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos_PE and sin_PE of integer positions, on their device, for the heads of a target."""
    frequencies, factor = _frequencies(target)
    angles = positions_P.double().unsqueeze(1) * frequencies.to(positions_P.device)
    angles_PE = torch.cat((angles, angles), dim=1)
    return (angles_PE.cos() * factor).to(dtype), (angles_PE.sin() * factor).to(dtype)


def _frequencies(target: TargetShape) -> tuple[Tensor, float]:
    """One angle per position and pair of channels [E / 2], and the factor that scales cos and sin."""
    parameters, width = target.rope_parameters, target.head_dim
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        return parameters["rope_theta"] ** -exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = target.max_position_embeddings
    llama = LlamaConfig(head_dim=width, max_position_embeddings=length, rope_parameters=dict(parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](llama, torch.device("cpu"))
    return frequencies.double(), factor


def rotate(x_RQE: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> Tensor:
    """Rotate every head of each row by the row's angle."""
    first, second = x_RQE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_RQE * cos_RE.unsqueeze(1) + turned * sin_RE.unsqueeze(1)
