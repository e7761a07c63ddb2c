"""The frozen pieces of the target that a trainer needs: embedding, final norm and head, and nothing else.

They live outside the draft: they are not trained, not sharded with it, not checkpointed and not exported. Only their
tensors are read from the checkpoint's safetensors files; the decoder layers never leave the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.contracts import NormState
from torchspec.nn.losses import SoftTeacher
from torchspec.target.checkpoint import TargetCheckpoint


@dataclass(frozen=True, slots=True)
class TargetHead:
    """Frozen tensors of the target. V target vocabulary, D draft vocabulary, X = V - D, H hidden size."""

    embedding_VH: Tensor
    draft_head_DH: Tensor
    """The head's rows of the draft vocabulary, in its order."""
    rest_head_XH: Tensor
    norm_H: Tensor
    norm_eps: float
    embedding_scale: float = 1.0
    """The target's own factor. EAGLE3's servers give a draft the rows as they are, DFlash's multiply them."""
    logit_cap: float | None = None
    """c of a soft cap."""

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding_VH)

    def teacher(self, lhs_NH: Tensor, norm_state: NormState) -> SoftTeacher:
        """The target's side of the loss, from its last hidden states; the final norm is applied exactly once.

        Raises:
            ValueError: ``norm_state`` is not one of ``post_norm`` and ``pre_norm``.
        """
        if norm_state not in ("post_norm", "pre_norm"):
            raise ValueError(f"norm_state={norm_state!r} must be 'post_norm' or 'pre_norm'")
        hidden_NH = lhs_NH.to(self.norm_H.dtype)
        if norm_state == "pre_norm":
            hidden_NH = F.rms_norm(hidden_NH, self.norm_H.shape, self.norm_H, self.norm_eps)
        return SoftTeacher(hidden_NH, self.draft_head_DH, self.rest_head_XH, self.logit_cap)


def load_target_head(
    target: TargetCheckpoint, dtype: torch.dtype, device: torch.device | str, draft_ids_D: Tensor | None = None
) -> TargetHead:
    """Read the frozen pieces of a target, in the form that its own layers use: norms of Gemma's are one plus the
    stored weights, and a scale of all logits is multiplied into the head.

    Args:
        dtype: what the tensors are kept and multiplied in.
        draft_ids_D: sorted target ids of the draft vocabulary; all of the target's by default.

    Raises:
        ValueError: a file or tensor is missing; the message names the folder and the tensor.
    """
    weights = target.weights
    tensors = weights.read({weights.embedding, weights.norm, target.head})
    embedding_VH = tensors[weights.embedding].to(device, dtype)
    head_VH = embedding_VH
    if target.head != weights.embedding or target.logit_scale != 1.0:
        head_VH = (tensors[target.head] * target.logit_scale).to(device, dtype)
    rest = torch.ones(len(head_VH), dtype=torch.bool)
    if draft_ids_D is None:
        draft_head_DH, rest = head_VH, ~rest
    else:
        ids = draft_ids_D.cpu()
        rest[ids] = False
        draft_head_DH = head_VH[ids.to(device)]
    return TargetHead(
        embedding_VH=embedding_VH,
        draft_head_DH=draft_head_DH,
        rest_head_XH=head_VH[rest.to(device)],
        norm_H=(tensors[weights.norm].float() + target.norm_offset).to(device, dtype),
        norm_eps=target.shape.rms_norm_eps,
        embedding_scale=target.embedding_scale,
        logit_cap=target.logit_cap,
    )
