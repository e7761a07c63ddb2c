"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split layout of Llama checkpoints.

Angles are computed in float64 and rounded once: true positions stay exact however long the sequence is.
Shapes: P positions, R rows, Q heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotary_table(
    parameters: Mapping[str, Any], width: int, max_positions: int, positions_P: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos_PE and sin_PE of integer positions, on their device.

    Args:
        parameters: ``rope_parameters`` of a config, as in transformers 5.
        width: E.
        max_positions: ``max_position_embeddings`` of the config.
    """
    frequencies, factor = _frequencies(parameters, width, max_positions)
    angles = positions_P.double().unsqueeze(1) * frequencies.to(positions_P.device)
    angles_PE = torch.cat((angles, angles), dim=1)
    return (angles_PE.cos() * factor).to(dtype), (angles_PE.sin() * factor).to(dtype)


def _frequencies(parameters: Mapping[str, Any], width: int, max_positions: int) -> tuple[Tensor, float]:
    """One angle per position and pair of channels [E / 2], and the factor that scales cos and sin."""
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        return parameters["rope_theta"] ** -exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(head_dim=width, max_position_embeddings=max_positions, rope_parameters=dict(parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](llama, torch.device("cpu"))
    return frequencies.double(), factor


def rotate(x_RQE: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> Tensor:
    """Rotate every head of each row by the row's angle."""
    first, second = x_RQE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_RQE * cos_RE.unsqueeze(1) + turned * sin_RE.unsqueeze(1)
