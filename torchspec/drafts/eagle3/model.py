"""EAGLE3's draft and its training-time-test (TTT) forward (arXiv 2503.01840).

    aux states g_i --fc--> h ---------------------------+--> midlayer --> h of the next TTT step (pre-norm, unshifted)
    target embedding of x_{i+1+t} --input_layernorm--> [cat] -> q, k, v      |
                             h ------hidden_norm------>                      +--> norm --> lm_head --> loss

The parameters carry exactly the names that servers load. The target's embedding, final norm and head stay outside
(:class:`TargetHead`). Which rows each step needs is decided by :class:`TTTRows`, where the alignment is spelled out;
the attention is :func:`ttt_attention`, the loss :func:`fused_soft_cross_entropy`. Whether samples are whole or shared
by several ranks is the business of an :class:`AttentionBackend`: all else is row-wise and does not see the difference.

All parameters are used inside the root module's ``forward``, the only entry, so ``fully_shard(draft)`` gathers them
once a micro-batch. Results are sums: whoever trains divides by the global number of counted positions. A batch without
any loss token gives a zero loss that still reaches every parameter, so all ranks run the same collectives.

Shapes: B batch, S padded length, A aux states concatenated (num_aux * H), H hidden size, C context rows, R active rows,
N teachers, T TTT steps, Q query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchspec.contracts import NormState
from torchspec.drafts.eagle3.attention import Block0
from torchspec.drafts.eagle3.sequences import FLASH, AttentionBackend, Sequences
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.nn.losses import compute_dtype, fused_soft_cross_entropy
from torchspec.nn.rope import rotary_table, rotate
from torchspec.target.head import TargetHead, load_target_head

__all__ = ["Batch", "DraftOutput", "Eagle3Draft", "Eagle3Spec", "TargetHead", "load_target_head"]


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded with anything finite. B and S are at least 1.

    Where samples are sharded, ``hs``, ``lhs`` and ``ids`` hold this rank's windows of them (``ShardFormula.windows``: a
    segment a row, and its halo), while ``loss_mask`` and ``lengths`` describe the whole samples on every rank.
    """

    hs_BSA: Tensor
    """Outputs of the aux layers, concatenated. Not read in a halo."""
    lhs_BSH: Tensor
    """Last hidden states; ``norm_state`` says whether the target's final norm has been applied."""
    ids_BS: Tensor
    loss_mask_BS: Tensor
    """bool, over tokens, False on padding. Stays on the CPU, where rows are selected without a device sync."""
    lengths_B: Tensor
    norm_state: NormState = "post_norm"

    def to(self, device: torch.device | str) -> Batch:
        """Move what the device works on."""
        hs, lhs, ids = (x.to(device, non_blocking=True) for x in (self.hs_BSA, self.lhs_BSH, self.ids_BS))
        return Batch(hs, lhs, ids, self.loss_mask_BS, self.lengths_B, self.norm_state)


class DraftOutput(NamedTuple):
    """Sums over the micro-batch. A tuple, so that FSDP2 finds the tensors in it."""

    total: Tensor
    """Scalar to run backward on: sum over t of ``step_weights[t] * loss_sum_T[t]``."""
    loss_sum_T: Tensor
    counted_T: Tensor
    """Scored positions whose target's first choice is in the draft vocabulary; only these have a loss."""
    supervised_T: Tensor
    """All scored positions."""
    correct_T: Tensor
    """Counted positions at which the draft's first choice is the target's."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """The projections around :func:`ttt_attention`. Its input is twice as wide as the model."""

    def __init__(self, config: Eagle3Spec):
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def queries(self, x_RX: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> Tensor:
        return rotate(self.q_proj(x_RX).unflatten(-1, (self.num_heads, self.head_dim)), cos_RE, sin_RE)

    def keys_values(self, x_RX: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.num_kv_heads, self.head_dim)
        k_RKE, v_RKE = (proj(x_RX).unflatten(-1, heads) for proj in (self.k_proj, self.v_proj))
        return rotate(k_RKE, cos_RE, sin_RE), v_RKE


class MLP(nn.Module):
    def __init__(self, config: Eagle3Spec):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Eagle3Spec):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_input(self, embedding_RH: Tensor, residual_RH: Tensor) -> Tensor:
        """What q, k and v are projected from, [R, 2H]."""
        return torch.cat((self.input_layernorm(embedding_RH), self.hidden_norm(residual_RH)), dim=-1)

    def forward(
        self,
        residual_RH: Tensor,
        x_RX: Tensor,
        rotary: tuple[Tensor, Tensor],
        sequences: Sequences,
        block0: Block0,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """The residual stream after one TTT step, from its attention input; see :func:`ttt_attention`."""
        attended_RQE = sequences.attend(self.self_attn.queries(x_RX, *rotary), block0, keys, values)
        residual_RH = residual_RH + self.self_attn.o_proj(attended_RQE.flatten(1))
        return residual_RH + self.mlp(self.post_attention_layernorm(residual_RH))


class Eagle3Draft(nn.Module):
    """The trainable draft.

    Args:
        activation_checkpointing: recompute the decoder layer of every TTT step in the backward.
        attention_backend: where the positions of a sample are; by default all of them are here.
    """

    def __init__(
        self,
        config: Eagle3Spec,
        activation_checkpointing: bool = False,
        attention_backend: AttentionBackend = FLASH,
    ):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.attention_backend = attention_backend
        self.fc = nn.Linear(config.num_aux * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = DecoderLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def forward(
        self,
        batch: Batch,
        target: TargetHead,
        ttt_length: int,
        step_weights: Sequence[float],
        loss_chunk_tokens: int = 1024,
    ) -> DraftOutput:
        """All TTT steps of one micro-batch and their loss.

        Args:
            batch: on the device of the parameters (its loss mask on the CPU).
            target: made for the same draft vocabulary.
            step_weights: one weight per TTT step.
            loss_chunk_tokens: logits of about so many positions exist at the same time, counting each TTT step's.

        Raises:
            ValueError: the target's draft vocabulary, the aux width or the number of weights does not fit.
        """
        self._check(batch, target, ttt_length, step_weights)
        device = batch.hs_BSA.device
        sequences = self.attention_backend.plan(batch.loss_mask_BS, batch.lengths_B, ttt_length, device)
        rows = sequences.rows
        assert batch.ids_BS.shape == sequences.shape_BS, "the batch does not hold the windows that the backend expects"
        hidden_TNH = self.norm(self._unroll(batch, target, sequences, ttt_length))
        teacher = target.teacher(batch.lhs_BSH.flatten(0, 1)[rows.teacher_flat_N], batch.norm_state)
        sums = fused_soft_cross_entropy(
            hidden_TNH, self.lm_head.weight, teacher, rows.scored_TN, step_weights, loss_chunk_tokens
        )
        supervised_T = rows.scored_TN.sum(1).to(sums.counted_T.dtype)
        return DraftOutput(sums.total, sums.loss_T, sums.counted_T, supervised_T, sums.correct_T)

    def _unroll(self, batch: Batch, target: TargetHead, sequences: Sequences, ttt_length: int) -> Tensor:
        """Residual stream after each TTT step at the rows that it scores, [T, N, H]."""
        layer, rows = self.midlayer, sequences.rows
        dtype = compute_dtype(self.fc.weight)
        cos_PE, sin_PE = rotary_table(self.config, rows.position_P, dtype)

        def rotary(angles: Tensor) -> tuple[Tensor, Tensor]:
            return cos_PE[angles], sin_PE[angles]

        def embedding(flat: Tensor) -> Tensor:
            return target.embed(batch.ids_BS.flatten()[flat.clamp(max=batch.ids_BS.numel() - 1)]).to(dtype)

        residual_CH = self.fc(batch.hs_BSA.flatten(0, 1)[rows.context_flat_C].to(dtype))
        x_CX = layer.attention_input(embedding(rows.context_flat_C + 1), residual_CH)
        block0 = sequences.block0(*layer.self_attn.keys_values(x_CX, *rotary(rows.context_angle_C)))

        residual_RH, x_RX = residual_CH[rows.active_in_context_R], x_CX[rows.active_in_context_R]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        scored = []
        for t in range(ttt_length):
            angles = rotary(rows.active_angle_R + t)
            if t > 0:
                x_RX = layer.attention_input(embedding(rows.active_flat_R + 1 + t), residual_RH)
                k, v = sequences.later_keys_values(*layer.self_attn.keys_values(x_RX, *angles))
                keys, values = [*keys, k], [*values, v]
            inputs = (residual_RH, x_RX, angles, sequences, block0, keys, values)
            residual_RH = (
                checkpoint(layer, *inputs, use_reentrant=False) if self.activation_checkpointing else layer(*inputs)
            )
            scored.append(residual_RH[rows.student_TN[t]])
        return torch.stack(scored)

    def _check(self, batch: Batch, target: TargetHead, ttt_length: int, step_weights: Sequence[float]) -> None:
        if len(step_weights) != ttt_length:
            raise ValueError(f"step_weights has {len(step_weights)} entries, training.ttt_length is {ttt_length}")
        if target.draft_head_DH.shape != self.lm_head.weight.shape:
            raise ValueError(
                f"the target head was loaded for {len(target.draft_head_DH)} draft tokens, "
                f"draft.vocab_size is {self.config.draft_vocab_size}"
            )
        if batch.hs_BSA.shape[-1] != self.fc.in_features:
            raise ValueError(
                f"aux states are {batch.hs_BSA.shape[-1]} wide; {self.config.num_aux} layers of "
                f"{self.config.hidden_size} make {self.fc.in_features}"
            )
