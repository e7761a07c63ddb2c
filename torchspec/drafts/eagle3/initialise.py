"""Where a draft's weights start.

The output rows always come from the target's head. ``default`` leaves the rest as torch makes it. ``target`` starts as
the target's own last decoder layer, fed with the deepest aux state: the new input, the next token's embedding, is
silent at first and everything is trained. That is worth about half of the samples in runs of minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.target.head import TargetHead, read_tensors

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SAME = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
INPUT_NORM = "input_layernorm"


@torch.no_grad()
def initialise(
    draft: Eagle3Draft, head: TargetHead, init: Literal["default", "target"], model_path: str | Path
) -> None:
    """Set the start weights of a whole (not yet sharded) draft.

    Args:
        head: the frozen pieces of the target, loaded for the draft's vocabulary.
        model_path: the target's checkpoint, of which ``target`` reads the last layer.

    Raises:
        ValueError: ``target``, and the last layer is not a Llama-like one.
    """
    draft.lm_head.weight.copy_(head.draft_head_DH)
    if init == "default":
        return
    draft.norm.weight.copy_(head.norm_H)
    size = draft.config.hidden_size
    draft.fc.weight.zero_()[:, -size:].fill_diagonal_(1.0)
    folder = Path(model_path)
    prefix = f"model.layers.{json.loads((folder / 'config.json').read_text())['num_hidden_layers'] - 1}."
    names = {name: f"{prefix}{name}.weight" for name in (*ATTENTION_INPUTS, *SAME, INPUT_NORM)}
    tensors = read_tensors(folder, set(names.values()))
    layer = draft.midlayer
    for name in SAME:
        layer.get_parameter(f"{name}.weight").copy_(tensors[names[name]])
    for name in ATTENTION_INPUTS:
        layer.get_parameter(f"{name}.weight").zero_()[:, size:].copy_(tensors[names[name]])
    layer.hidden_norm.weight.copy_(tensors[names[INPUT_NORM]])
