"""What one training rank keeps in its device's memory at the peak of a step, from shapes alone.

The peak comes where the backward starts: every TTT step's activations are there, and the gradients begin to be. Counted
for the worst sample, one whose tokens all have a loss. Prompts make it less, fused kernels too (on a GPU the norms keep
less than counted here). ``benchmarks/usp.py`` holds the figures against measured ones.

With sequence parallelism a rank computes 1/N of the rows. What it keeps of block-0 keys and values depends on the way:

    circulating   those of its ring rank, S / R positions
    gathered      those of the whole sample, S positions
    either        of 1/U of the heads, repeated where there are fewer key/value heads than Ulysses ranks

Here S are the tokens of a sample and N = U * R its ranks (Ulysses x ring).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torchspec.config.schema import TrainingConfig
from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.parallel.ulysses import key_value_repeats
from torchspec.shards import ShardFormula

MASTER = 4
"""Bytes of an element of the weights' masters, their gradients and moments, and of all sums: float32."""

PROCESS_BYTES = 1 << 30
"""A rank's interpreter and libraries, and what no formula counts."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes, by what they are for."""

    weights: int
    """Masters, gradients and AdamW's two moments; with FSDP2 a shard of each, and what is gathered for use."""
    target_head: int
    """The target's embedding and head, frozen."""
    inputs: int
    """One micro-batch as it comes from the store."""
    activations: int
    """What the forward keeps of each row for the backward."""
    keys_values: int
    """Block 0, for all TTT steps."""
    temporaries: int
    """Logits of a chunk and gradients of the hidden states, or else what the first attention's backward takes."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(draft: Eagle3Spec, training: TrainingConfig, num_tokens: int, state_dtype: str) -> RankMemory:
    """Peak of a step whose samples all have ``num_tokens`` tokens.

    Args:
        training: with its dtype resolved.
        state_dtype: what the target's hidden states are stored in.

    Raises:
        ValueError: the draft's heads cannot be split over ``training.sp_ulysses_size`` ranks.
    """
    formula = _formula(training)
    samples = min(training.micro_batch_size, -(-training.batch_size // training.dp_size))
    rows = samples * formula.parts * formula.chunk(num_tokens)
    windows, columns = formula.window_shape([num_tokens] * samples)
    row = _RowBytes.of(draft, training)
    block0 = _Block0Bytes.of(draft, training, formula, samples, num_tokens)
    leaving_loss = rows * row.hidden_gradients + _logits(draft, training, rows)
    in_attention = rows * (row.hidden_gradients + row.attention - row.freed) + block0.gradients
    return RankMemory(
        weights=_weights(draft_parameters(draft), training),
        target_head=2 * draft.vocab_size * draft.hidden_size * ITEM_BYTES[training.dtype],
        inputs=windows * columns * _token_bytes(draft, state_dtype),
        activations=rows * row.kept,
        keys_values=block0.kept,
        temporaries=max(leaving_loss, in_attention),
    )


def host_bytes(draft: Eagle3Spec, training: TrainingConfig, num_tokens: int, kept: int, state_dtype: str) -> int:
    """Host memory of a rank beside what :func:`rank_memory` counts: libraries, the store's buffer, fetched samples.

    Args:
        kept: samples that all ranks together hold at the same time.
    """
    formula = _formula(training)
    windows, columns = formula.window_shape([num_tokens] * -(-kept // training.dp_size))
    return PROCESS_BYTES + training.buffer_bytes + windows * columns * _token_bytes(draft, state_dtype)


def draft_parameters(draft: Eagle3Spec) -> int:
    """Trained parameters of the one-layer EAGLE3 draft."""
    hidden, queries, keys = draft.hidden_size, *_widths(draft)
    attention = 2 * hidden * (queries + 2 * keys) + queries * hidden
    norms = 4 * hidden
    mlp, head = 3 * hidden * draft.intermediate_size, draft.draft_vocab_size * hidden
    return draft.num_aux * hidden**2 + attention + mlp + head + norms


def _formula(training: TrainingConfig) -> ShardFormula:
    return training.shard_formula or ShardFormula(1, 1, "contiguous", training.ttt_length)


def _token_bytes(draft: Eagle3Spec, state_dtype: str) -> int:
    return (draft.num_aux + 1) * draft.hidden_size * ITEM_BYTES[state_dtype] + ITEM_BYTES["int32"]


def _widths(draft: Eagle3Spec) -> tuple[int, int]:
    return draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim


def _weights(parameters: int, training: TrainingConfig) -> int:
    item = ITEM_BYTES[training.dtype]
    cast = parameters * item if item != MASTER else 0  # autocast keeps its copies
    if training.sharding == "replicated" or training.world_size == 1:
        return 4 * MASTER * parameters + cast
    gathered = 2 * MASTER * parameters  # weights and gradients of the whole draft
    return 4 * MASTER * parameters // training.world_size + gathered + cast


class _RowBytes(NamedTuple):
    """Bytes of a row: inputs of matmuls in the dtype of the run, those of norms in float32."""

    kept: int
    hidden_gradients: int
    """Of the hidden states of all TTT steps."""
    attention: int
    """The backward's copies of q, o and their gradients, at their slots."""
    freed: int
    """Of what is kept, gone by the time that the backward reaches an attention."""

    @classmethod
    def of(cls, draft: Eagle3Spec, training: TrainingConfig) -> _RowBytes:
        hidden, item, steps = draft.hidden_size, ITEM_BYTES[training.dtype], training.ttt_length
        queries, keys = _widths(draft)
        context = item * ((draft.num_aux + 3) * hidden + 2 * draft.head_dim - 2 * keys)  # no diagonal keys in step 0
        entry = item * (2 * hidden + 2 * keys + 2 * draft.head_dim) + MASTER * 3 * hidden
        diagonal = MASTER * draft.num_heads * (steps + 3) // 2  # log-sum-exp, and the weights of on average so many
        attention = item * 2 * queries + diagonal + (MASTER * queries if item != MASTER else 0)  # o unrounded, too
        mlp = item * (hidden + 4 * draft.intermediate_size) + MASTER * 2 * hidden
        exit_ = item * hidden + MASTER * 2 * hidden  # gradient of the loss, final norm
        layers = 1 if training.activation_checkpointing else steps
        return cls(
            kept=context + steps * (entry + exit_) + layers * (attention + mlp),
            hidden_gradients=steps * item * hidden,
            attention=6 * MASTER * queries,
            freed=steps * exit_ + mlp,
        )


class _Block0Bytes(NamedTuple):
    kept: int
    gradients: int
    """Their sums, float32, and the flash kernel's keys, values and gradients, with as many heads as the queries."""

    @classmethod
    def of(
        cls, draft: Eagle3Spec, training: TrainingConfig, formula: ShardFormula, samples: int, num_tokens: int
    ) -> _Block0Bytes:
        ulysses, item = formula.ulysses_size, ITEM_BYTES[training.dtype]
        queries, keys = _widths(draft)
        repeats = key_value_repeats(draft.num_heads, draft.num_kv_heads, ulysses)
        queries, keys = queries // ulysses, keys * repeats // ulysses
        circulates = formula.ring_size > 1 and not training.sp_gather_once
        slots = ulysses * formula.parts * formula.chunk(num_tokens) if circulates else num_tokens
        kept, gradient = item * 2 * keys, MASTER * 2 * keys
        travelling = kept + 2 * gradient if circulates else 0  # the next keys; gradients on their way in, and out
        at_once = samples if formula.size == 1 else 1  # a tile of a ring is of one sample
        kernel = at_once * slots * item * 4 * queries
        return cls(samples * slots * kept, samples * slots * (2 * gradient + travelling) + kernel)


def _logits(draft: Eagle3Spec, training: TrainingConfig, rows: int) -> int:
    """Logits of a chunk, the gradient of the draft's head, and under autocast their copies in the other dtype."""
    item, vocab = ITEM_BYTES[training.dtype], draft.draft_vocab_size
    chunk = min(training.loss_chunk_tokens, rows * training.ttt_length)
    teachers = -(-chunk // training.ttt_length)
    teacher = vocab * MASTER + (draft.vocab_size - vocab) * item
    student, head = vocab * item, vocab * draft.hidden_size * MASTER
    if item != MASTER:
        student, head = student + vocab * MASTER, head + vocab * draft.hidden_size * item
    return chunk * student + teachers * teacher + head
