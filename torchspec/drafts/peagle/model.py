"""P-EAGLE's draft and its training forward (arXiv 2602.01469): all positions of a chain, guessed in one pass.

    position 0    aux states g_i   --fc--> h    embedding of x_{i+1}  --> layers --> norm --> lm_head --> x_{i+2}
    position k    mask_hidden      --fc--> h    embedding of MASK     --> layers --> norm --> lm_head --> x_{i+2+k}

At position k a row stands at angle i + k and attends to what position 0 holds of rows 0 .. i, and to its own positions
1 .. k. A server's cache holds just that, so training shows a draft what serving will. And it is the attention of a
chain (:func:`chain_attention`), whose rows and teachers are EAGLE3's: no mask over all positions of all rows is made,
which is what the paper's sampling and slicing of masks are for. Its sampling of positions becomes their weights.

Nothing that position k reads depends on what position k - 1 has guessed, so layers go outside and positions inside.
What enters the first layer is the same vector at all later positions of all rows: it is computed once, and only the
angles tell them apart.

Shapes: B batch, S padded length, A aux states concatenated (num_aux * H), H hidden size, X width of the attention's
input, C context rows, R active rows, K positions, P angles, E head dimension.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from torchspec.drafts.chain_draft import ChainDraft
from torchspec.drafts.draft import Batch, DraftOptions, DraftOutput
from torchspec.drafts.peagle.spec import PEagleSpec
from torchspec.nn.decoder import DecoderLayer
from torchspec.nn.layers import PartNorms, RMSNorm
from torchspec.nn.losses import compute_dtype
from torchspec.nn.rope import rotary_table
from torchspec.nn.sequences import WholeSequences
from torchspec.target.head import TargetHead

Rotation = tuple[Tensor, Tensor]
"""cos_RE and sin_RE of some rows."""


class PEagleDraft(ChainDraft):
    spec: PEagleSpec

    def __init__(self, spec: PEagleSpec, options: DraftOptions | None = None):
        super().__init__(spec, options)
        target = spec.target
        hidden, eps, aux = target.hidden_size, target.rms_norm_eps, len(spec.layers) * target.hidden_size
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, aux))
        self.fc_norm = PartNorms(len(spec.layers), hidden, eps) if spec.fc_norm else nn.Identity()
        self.fc = nn.Linear(aux, hidden, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(target, first=i == 0) for i in range(spec.num_layers))
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, spec.draft_vocab_size, bias=False)

    @property
    def decoder(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))

    def forward(self, batch: Batch, head: TargetHead) -> DraftOutput:
        """All positions of one micro-batch and their loss."""
        self.check(batch, head)
        device = batch.hs_BSA.device
        sequences = WholeSequences.plan(batch.loss_mask_BS, batch.lengths_B, self.spec.num_positions, device)
        return self.scored(self.norm(self._residual(batch, head, sequences)), batch, head, sequences.rows)

    def _residual(self, batch: Batch, head: TargetHead, sequences: WholeSequences) -> Tensor:
        """What leaves the last layer of the active rows, [K, R, H]."""
        rows, later = sequences.rows, self.spec.num_positions - 1
        decoder = self.decoder
        dtype, ids = compute_dtype(self.fc.weight), batch.ids_BS.flatten()
        mask = ids.new_full((1,), self.spec.mask_token_id)
        embedding_CH = head.embed(ids[(rows.context_flat_C + 1).clamp(max=len(ids) - 1)]).to(dtype)
        context_CH = self._mixed(batch.hs_BSA.flatten(0, 1)[rows.context_flat_C].to(dtype))
        masked_1H = self._mixed(self.mask_hidden.flatten(0, 1).to(dtype))
        residuals = [context_CH, *[masked_1H] * later]
        masked_1X = decoder[0].attention_input(head.embed(mask).to(dtype), masked_1H)
        inputs = [decoder[0].attention_input(embedding_CH, context_CH), *[masked_1X] * later]
        rotations = self._rotations(sequences, dtype)
        for layer in decoder:
            if not layer.first:
                inputs = [layer.input_layernorm(residual) for residual in residuals]
            residuals = self._positions(layer, residuals, inputs, rotations, sequences, layer is decoder[-1])
        return torch.stack(residuals)

    def _mixed(self, aux: Tensor) -> Tensor:
        return self.fc(self.fc_norm(aux))

    def _rotations(self, sequences: WholeSequences, dtype: torch.dtype) -> list[Rotation]:
        """Of the context rows, and of the active rows at each later position."""
        rows = sequences.rows
        table = rotary_table(self.spec.target, rows.position_P, dtype)
        angles = [rows.context_angle_C, *(rows.active_angle_R + k for k in range(1, self.spec.num_positions))]
        return [(table[0][angle], table[1][angle]) for angle in angles]

    def _positions(
        self,
        layer: DecoderLayer,
        residuals: list[Tensor],
        inputs: list[Tensor],
        rotations: list[Rotation],
        sequences: WholeSequences,
        last: bool,
    ) -> list[Tensor]:
        """One layer: the residual streams of all positions, from their attention inputs.

        Position 0 is that of the context rows, whose states the next layer's keys need. Behind the last layer only the
        active ones are of use.
        """
        block0 = sequences.block0(*layer.self_attn.keys_values(inputs[0], *rotations[0]))
        later = zip(inputs[1:], rotations[1:], strict=True)
        keys, values = zip(*(layer.self_attn.keys_values(x, *rotation) for x, rotation in later), strict=True)
        if last:
            rows_R = sequences.rows.active_in_context_R
            cos_CE, sin_CE = rotations[0]
            at_0 = residuals[0][rows_R], inputs[0][rows_R], (cos_CE[rows_R], sin_CE[rows_R]), sequences, block0
        else:
            at_0 = residuals[0], inputs[0], rotations[0], sequences, sequences.among_context(block0)
        found = [self.run(layer, *at_0, [], [])]
        for k in range(1, len(residuals)):
            at_k = residuals[k], inputs[k], rotations[k], sequences, block0
            found.append(self.run(layer, *at_k, keys[:k], values[:k]))
        return found
