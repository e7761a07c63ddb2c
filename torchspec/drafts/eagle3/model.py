"""EAGLE3's draft and its training-time-test (TTT) forward (arXiv 2503.01840).

    aux states g_i --fc--> h ---------------------------+--> midlayer --> h of the next TTT step (unshifted; pre-norm,
    target embedding of x_{i+1+t} --input_layernorm--> [cat] -> q, k, v      |
                             h ------hidden_norm------>                      |       or with norm_output post-norm)
                                                                             +--> norm --> lm_head --> loss

The parameters carry exactly the names that servers load. The target's embedding, final norm and head stay outside
(:class:`TargetHead`). Which rows each step needs is decided by :class:`ChainRows`, where the alignment is spelled out;
the attention is :func:`chain_attention`, the loss that of :class:`ChainDraft`. Whether samples are whole or shared
by several ranks is the business of a :data:`Planner`: all else is row-wise and does not see the difference.

Shapes: B batch, S padded length, A aux states concatenated (num_aux * H), H hidden size, C context rows, R active rows,
T TTT steps, E head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.drafts.chain_draft import ChainDraft
from torchspec.drafts.draft import Batch, DraftOptions, DraftOutput
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.nn.decoder import DecoderLayer
from torchspec.nn.layers import PartNorms, RMSNorm
from torchspec.nn.losses import compute_dtype
from torchspec.nn.rope import rotary_table
from torchspec.nn.sequences import Planner, Sequences, WholeSequences
from torchspec.parallel.usp import UspBackend
from torchspec.target.head import TargetHead


class Eagle3Draft(ChainDraft):
    """The trainable draft. :attr:`plan` knows where the positions of a sample are."""

    spec: Eagle3Spec

    def __init__(self, spec: Eagle3Spec, options: DraftOptions | None = None):
        super().__init__(spec, options)
        self.plan: Planner = WholeSequences.plan
        target, sharing = spec.target, self.options.sharing
        if sharing is not None:
            self.plan = UspBackend(sharing, target).plan
        aux_size, eps = len(spec.layers) * target.hidden_size, target.rms_norm_eps
        self.input_norm = RMSNorm(aux_size, eps) if spec.norm_before_fc else nn.Identity()
        self.fc_norm = PartNorms(len(spec.layers), target.hidden_size, eps) if spec.fc_norm else nn.Identity()
        self.fc = nn.Linear(aux_size, target.hidden_size, bias=False)
        self.midlayer = DecoderLayer(target, first=True)
        self.norm = RMSNorm(target.hidden_size, eps)
        self.lm_head = nn.Linear(target.hidden_size, spec.draft_vocab_size, bias=False)

    @property
    def decoder(self) -> list[DecoderLayer]:
        return [self.midlayer]

    def forward(self, batch: Batch, head: TargetHead) -> DraftOutput:
        """All TTT steps of one micro-batch and their loss."""
        self.check(batch, head)
        device = batch.hs_BSA.device
        sequences = self.plan(batch.loss_mask_BS, batch.lengths_B, self.spec.ttt_length, device)
        assert batch.ids_BS.shape == sequences.shape_BS, "the batch does not hold the windows that the plan expects"
        hidden_TRH = self._unroll(batch, head, sequences)
        if not self.spec.norm_output:  # else every step has seen to it
            hidden_TRH = self.norm(hidden_TRH)
        return self.scored(hidden_TRH, batch, head, sequences.rows)

    def _unroll(self, batch: Batch, head: TargetHead, sequences: Sequences) -> Tensor:
        """What each TTT step leaves of the active rows, and the next one starts from, [T, R, H]."""
        layer, rows = self.midlayer, sequences.rows
        dtype = compute_dtype(self.fc.weight)
        cos_PE, sin_PE = rotary_table(self.spec.target, rows.position_P, dtype)

        def rotary(angles: Tensor) -> tuple[Tensor, Tensor]:
            return cos_PE[angles], sin_PE[angles]

        def embedding(flat: Tensor) -> Tensor:
            return head.embed(batch.ids_BS.flatten()[flat.clamp(max=batch.ids_BS.numel() - 1)]).to(dtype)

        aux_CA = batch.hs_BSA.flatten(0, 1)[rows.context_flat_C].to(dtype)
        residual_CH = self.fc(self.fc_norm(self.input_norm(aux_CA)))
        x_CX = layer.attention_input(embedding(rows.context_flat_C + 1), residual_CH)
        block0 = sequences.block0(*layer.self_attn.keys_values(x_CX, *rotary(rows.context_angle_C)))

        residual_RH, x_RX = residual_CH[rows.active_in_context_R], x_CX[rows.active_in_context_R]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        residuals = []
        for t in range(self.spec.ttt_length):
            angles = rotary(rows.active_angle_R + t)
            if t > 0:
                x_RX = layer.attention_input(embedding(rows.active_flat_R + 1 + t), residual_RH)
                k, v = sequences.later_keys_values(*layer.self_attn.keys_values(x_RX, *angles))
                keys, values = [*keys, k], [*values, v]
            residual_RH = self.run(layer, residual_RH, x_RX, angles, sequences, block0, keys, values)
            if self.spec.norm_output:
                residual_RH = self.norm(residual_RH)
            residuals.append(residual_RH)
        return torch.stack(residuals)
