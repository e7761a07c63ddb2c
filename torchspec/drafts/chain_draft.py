"""What EAGLE3 and P-EAGLE share as modules: what is before and behind their decoder layers, and where these start.

The output rows always come from the target's head. ``init: default`` leaves the rest as torch makes it. ``target``
starts as the target's own last decoder layers, fed with the deepest aux state: the new input, the next token's
embedding, is silent at first and everything is trained. That is worth about half of the samples in runs of minutes. A
norm before ``fc`` takes that state's scale away: then it is the target's layers up to that.

Shapes: K positions, R active rows, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
import torch._dynamo
from torch import Tensor, nn

from torchspec.drafts.draft import Batch, Draft, DraftOutput
from torchspec.drafts.spec import ChainSpec
from torchspec.nn.chain_rows import ChainRows
from torchspec.nn.decoder import DecoderLayer
from torchspec.nn.layers import RMSNorm
from torchspec.nn.losses import fused_cross_entropy
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import TargetHead


class ChainDraft(Draft):
    """The module of a :class:`ChainSpec`."""

    spec: ChainSpec
    fc: nn.Linear
    norm: RMSNorm
    lm_head: nn.Linear

    @property
    @abstractmethod
    def decoder(self) -> list[DecoderLayer]:
        """All of its layers."""

    def compile(self) -> None:
        """The layers, the part without data-dependent shapes. Each is compiled once for each position, which has one
        diagonal term more than the one before."""
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 2 * self.spec.positions * len(self.decoder))
        for layer in self.decoder:
            layer.compile(dynamic=True)

    def scored(self, hidden_KRH: Tensor, batch: Batch, head: TargetHead, rows: ChainRows) -> DraftOutput:
        """The loss of what the last norm leaves of the active rows; it is divided by what is counted at position 0."""
        sums = fused_cross_entropy(
            hidden_KRH.flatten(0, 1),
            self.lm_head.weight,
            head.teacher(batch.lhs_BSH.flatten(0, 1)[rows.teacher_flat_N], batch.norm_state),
            rows.students,
            self.spec.position_weights,
            self.options.loss_chunk_tokens,
        )
        return DraftOutput(sums.total, sums.counted_K[0], *sums[1:])

    @torch.no_grad()
    def initialise(self, head: TargetHead, target: TargetCheckpoint) -> Self:
        """Set the start weights of a whole (not yet sharded) draft, as ``spec.init`` says.

        Args:
            head: the frozen pieces of the target, loaded for the draft's vocabulary.
            target: of whose weights ``target`` reads as many layers as the draft has, the last ones.

        Raises:
            ValueError: ``target``, and those layers are no Llama-like ones, or the target has fewer.
        """
        self.lm_head.weight.copy_(head.draft_head_DH)
        if self.spec.init == "target":
            self.norm.weight.copy_(head.norm_H)
            self.fc.weight.zero_()[:, -self.fc.out_features :].fill_diagonal_(1.0)
            for number, layer in enumerate(self.decoder, start=target.num_layers - len(self.decoder)):
                _copy(layer, target.weights.layer(number), target)
        return self


def _copy(layer: DecoderLayer, prefix: str, target: TargetCheckpoint) -> None:
    """Make ``layer`` the target's. A first layer hears nothing of the embedding, the left half of its input."""
    names = {name: f"{prefix}{name}" for name, _ in layer.named_parameters()}
    if layer.first:
        names["hidden_norm.weight"] = names.pop("input_layernorm.weight")
    tensors = target.weights.read(names.values())
    for name, source in names.items():
        weight = tensors[source]
        layer.get_parameter(name).zero_()[..., -weight.shape[-1] :].copy_(weight)
