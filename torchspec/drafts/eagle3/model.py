"""EAGLE3's draft and its training-time-test (TTT) forward (arXiv 2503.01840).

    aux states g_i --fc--> h ---------------------------+--> midlayer --> h of the next TTT step (unshifted; pre-norm,
    target embedding of x_{i+1+t} --input_layernorm--> [cat] -> q, k, v      |
                             h ------hidden_norm------>                      |       or with norm_output post-norm)
                                                                             +--> norm --> lm_head --> loss

The parameters carry exactly the names that servers load. The target's embedding, final norm and head stay outside
(:class:`TargetHead`). Which rows each step needs is decided by :class:`ChainRows`, where the alignment is spelled out;
the attention is :func:`chain_attention`, the loss :func:`fused_cross_entropy`. Whether samples are whole or shared
by several ranks is the business of a :data:`Planner`: all else is row-wise and does not see the difference.

Shapes: B batch, S padded length, A aux states concatenated (num_aux * H), H hidden size, C context rows, R active rows,
T TTT steps, E head dimension.
"""

from __future__ import annotations

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchspec.drafts.draft import Batch, Draft, DraftOptions, DraftOutput
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.drafts.initialise import initialise
from torchspec.nn.decoder import DecoderLayer
from torchspec.nn.layers import PartNorms, RMSNorm
from torchspec.nn.losses import compute_dtype, fused_cross_entropy
from torchspec.nn.rope import rotary_table
from torchspec.nn.sequences import Planner, Sequences, WholeSequences
from torchspec.parallel.usp import UspBackend
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import TargetHead


class Eagle3Draft(Draft):
    """The trainable draft. :attr:`plan` knows where the positions of a sample are."""

    spec: Eagle3Spec

    def __init__(self, spec: Eagle3Spec, options: DraftOptions | None = None):
        super().__init__()
        self.spec = spec
        self.options = options = options or DraftOptions()
        self.plan: Planner = WholeSequences.plan
        target = spec.target
        if options.sharing is not None:
            self.plan = UspBackend.on(options.sharing, target.num_heads, target.num_kv_heads).plan
        aux_size, eps = len(spec.layers) * target.hidden_size, target.rms_norm_eps
        self.input_norm = RMSNorm(aux_size, eps) if spec.norm_before_fc else nn.Identity()
        self.fc_norm = PartNorms(len(spec.layers), target.hidden_size, eps) if spec.fc_norm else nn.Identity()
        self.fc = nn.Linear(aux_size, target.hidden_size, bias=False)
        self.midlayer = DecoderLayer(target, first=True)
        self.norm = RMSNorm(target.hidden_size, eps)
        self.lm_head = nn.Linear(target.hidden_size, spec.draft_vocab_size, bias=False)

    def compile(self) -> None:
        """The layer, the part of the forward without data-dependent shapes. It is compiled once for each TTT step,
        because each has one diagonal term more."""
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 2 * self.spec.ttt_length)
        self.midlayer.compile(dynamic=True)

    def forward(self, batch: Batch, head: TargetHead) -> DraftOutput:
        """All TTT steps of one micro-batch and their loss; it is divided by the positions counted in the first."""
        self.check(batch, head)
        device = batch.hs_BSA.device
        sequences = self.plan(batch.loss_mask_BS, batch.lengths_B, self.spec.ttt_length, device)
        rows = sequences.rows
        assert batch.ids_BS.shape == sequences.shape_BS, "the batch does not hold the windows that the plan expects"
        hidden_TRH = self._unroll(batch, head, sequences)
        if not self.spec.norm_output:  # else every step has seen to it
            hidden_TRH = self.norm(hidden_TRH)
        teacher = head.teacher(batch.lhs_BSH.flatten(0, 1)[rows.teacher_flat_N], batch.norm_state)
        sums = fused_cross_entropy(
            hidden_TRH.flatten(0, 1),
            self.lm_head.weight,
            teacher,
            rows.students,
            self.spec.step_weights,
            self.options.loss_chunk_tokens,
        )
        return DraftOutput(sums.total, sums.counted_K[0], *sums[1:])

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
            inputs = (residual_RH, x_RX, angles, sequences, block0, keys, values)
            residual_RH = checkpoint(layer, *inputs, use_reentrant=False) if self.options.recompute else layer(*inputs)
            if self.spec.norm_output:
                residual_RH = self.norm(residual_RH)
            residuals.append(residual_RH)
        return torch.stack(residuals)


def build(spec: Eagle3Spec, head: TargetHead, target: TargetCheckpoint, options: DraftOptions) -> Eagle3Draft:
    """See :meth:`DraftSpec.build`."""
    draft = Eagle3Draft(spec, options)
    initialise(draft, [draft.midlayer], head, spec.init, target)
    return draft
