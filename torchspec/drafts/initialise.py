"""Where the weights of a draft start that is made like the target's own last layers.

The output rows always come from the target's head. ``default`` leaves the rest as torch makes it. ``target`` starts as
the target's own last decoder layers, fed with the deepest aux state: the new input, the next token's embedding, is
silent at first and everything is trained. That is worth about half of the samples in runs of minutes. A norm before
``fc`` takes that state's scale away: then it is the target's layers up to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn

from torchspec.nn.decoder import DecoderLayer
from torchspec.nn.layers import RMSNorm
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import TargetHead

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SAME = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
INPUT_NORM = "input_layernorm"


class Ends(Protocol):
    """What a draft has before and behind its layers."""

    fc: nn.Linear
    norm: RMSNorm
    lm_head: nn.Linear


@torch.no_grad()
def initialise(
    draft: Ends,
    layers: Sequence[DecoderLayer],
    head: TargetHead,
    init: Literal["default", "target"],
    target: TargetCheckpoint,
) -> None:
    """Set the start weights of a whole (not yet sharded) draft.

    Args:
        layers: the draft's, all of them.
        head: the frozen pieces of the target, loaded for the draft's vocabulary.
        target: of whose weights ``target`` reads as many layers, the last ones.

    Raises:
        ValueError: ``target``, and those layers are no Llama-like ones, or the target has fewer.
    """
    draft.lm_head.weight.copy_(head.draft_head_DH)
    if init == "default":
        return
    draft.norm.weight.copy_(head.norm_H)
    draft.fc.weight.zero_()[:, -draft.fc.out_features :].fill_diagonal_(1.0)
    for number, layer in enumerate(layers, start=target.num_layers - len(layers)):
        _copy(layer, f"model.layers.{number}.", target)


def _copy(layer: DecoderLayer, prefix: str, target: TargetCheckpoint) -> None:
    """Make ``layer`` the target's. A first layer hears nothing of the embedding, the left half of its input."""
    names = {name: f"{prefix}{name}.weight" for name in (*ATTENTION_INPUTS, *SAME, INPUT_NORM)}
    tensors = target.tensors(names.values())
    for name in SAME:
        layer.get_parameter(f"{name}.weight").copy_(tensors[names[name]])
    for name in ATTENTION_INPUTS:
        weight = tensors[names[name]]
        layer.get_parameter(f"{name}.weight").zero_()[:, -weight.shape[1] :].copy_(weight)
    norm = layer.hidden_norm if layer.first else layer.input_layernorm
    norm.weight.copy_(tensors[names[INPUT_NORM]])
