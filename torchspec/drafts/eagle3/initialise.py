"""Where a draft's weights start.

The output rows always come from the target's head. ``default`` leaves the rest as torch makes it. ``target`` starts as
the target's own last decoder layer, fed with the deepest aux state: the new input, the next token's embedding, is
silent at first and everything is trained. That is worth about half of the samples in runs of minutes. A norm before
``fc`` takes that state's scale away: then it is the target's layer up to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import TargetHead

if TYPE_CHECKING:
    from torchspec.drafts.eagle3.model import Eagle3Draft

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SAME = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
INPUT_NORM = "input_layernorm"


@torch.no_grad()
def initialise(
    draft: Eagle3Draft, head: TargetHead, init: Literal["default", "target"], target: TargetCheckpoint
) -> None:
    """Set the start weights of a whole (not yet sharded) draft.

    Args:
        head: the frozen pieces of the target, loaded for the draft's vocabulary.
        target: of whose weights ``target`` reads the last layer.

    Raises:
        ValueError: ``target``, and the last layer is not a Llama-like one.
    """
    draft.lm_head.weight.copy_(head.draft_head_DH)
    if init == "default":
        return
    draft.norm.weight.copy_(head.norm_H)
    size = draft.spec.target.hidden_size
    draft.fc.weight.zero_()[:, -size:].fill_diagonal_(1.0)
    prefix = f"model.layers.{target.num_layers - 1}."
    names = {name: f"{prefix}{name}.weight" for name in (*ATTENTION_INPUTS, *SAME, INPUT_NORM)}
    tensors = target.tensors(names.values())
    layer = draft.midlayer
    for name in SAME:
        layer.get_parameter(f"{name}.weight").copy_(tensors[names[name]])
    for name in ATTENTION_INPUTS:
        layer.get_parameter(f"{name}.weight").zero_()[:, size:].copy_(tensors[names[name]])
    layer.hidden_norm.weight.copy_(tensors[names[INPUT_NORM]])
