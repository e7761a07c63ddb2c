"""What an EAGLE3 step costs, from shapes alone: parameters, operations, memory.

**Memory** is that of the peak of a step, which comes where the backward starts: every TTT step's activations are there,
and the gradients begin to be. Counted for the worst sample, one whose tokens all have a loss. Prompts make it less,
fused kernels too (on a GPU the norms keep less than counted here). ``benchmarks/usp.py`` holds the figures against
measured ones.

With sequence parallelism a rank computes 1/N of the rows. What it keeps of block-0 keys and values depends on the way:

    circulating   those of its ring rank, S / R positions
    gathered      those of the whole sample, S positions
    either        of 1/U of the heads, repeated where there are fewer key/value heads than Ulysses ranks

Here S are the tokens of a sample and N = U * R its ranks (Ulysses x ring).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.spec import MASTER, RankBytes, Work
from torchspec.shards import ShardFormula, key_value_repeats

if TYPE_CHECKING:
    from torchspec.drafts.eagle3.spec import Eagle3Spec


def flops(spec: Eagle3Spec, tokens: int, scored: int) -> float:
    """Operations of forward and backward on one sample; a multiply-add counts as two.

    S tokens, N of them scored, T TTT steps; H hidden, Q and K widths of queries and of keys, I of the MLP, D and V
    vocabularies of draft and target:

        once            fc: S * (aux * H) * H      block-0 keys and values: S * 2H * 2K
        in each step    q, o: N * (2H * Q + Q * H)     MLP: N * 3 * H * I     head: N * H * D
                        block-0 attention: 2 * Q * N * (S - N / 2)    (scored rows are the last ones)
        later steps     their own keys and values: N * 2H * 2K
        teacher         N * H * V, forward only

    Trained matrices cost three times their forward (gradients of inputs and of weights). Model FLOPs utilisation (PaLM,
    arXiv 2204.02311) counts what the model needs, not what an implementation spends: no recomputation, no padding, of
    the draft's own rows only those that are scored.
    """
    hidden, queries, keys = spec.target.hidden_size, *spec.target.widths
    once = tokens * (len(spec.layers) * hidden * hidden + 4 * hidden * keys)
    mlp, head = 3 * hidden * spec.target.intermediate_size, hidden * spec.draft_vocab_size
    step = scored * (3 * hidden * queries + mlp + head)
    attention = 2 * queries * scored * (tokens - scored / 2)
    later = (spec.ttt_length - 1) * scored * 4 * hidden * keys
    teacher = scored * hidden * spec.target.vocab_size
    return 2.0 * (3 * (once + spec.ttt_length * (step + attention) + later) + teacher)


def rank_bytes(spec: Eagle3Spec, work: Work) -> RankBytes:
    """Peak of a micro-batch. Raises ValueError: the heads cannot be split over the Ulysses ranks."""
    formula = work.sharding or ShardFormula(1, 1, "contiguous", spec.halo)
    rows = work.samples * formula.parts * formula.chunk(work.num_tokens)
    row = _RowBytes.of(spec, work)
    block0 = _Block0Bytes.of(spec, work, formula)
    leaving_loss = rows * row.hidden_gradients + spec.logits_bytes(work, rows)
    in_attention = rows * (row.hidden_gradients + row.attention - row.freed) + block0.gradients
    return RankBytes(rows * row.kept, block0.kept, max(leaving_loss, in_attention))


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
    def of(cls, spec: Eagle3Spec, work: Work) -> _RowBytes:
        target, item, steps = spec.target, ITEM_BYTES[work.dtype], spec.ttt_length
        hidden, width, (queries, keys) = target.hidden_size, target.head_dim, spec.target.widths
        aux = len(spec.layers) * hidden
        context = item * (aux + 3 * hidden + 2 * width - 2 * keys)  # no diagonal keys in step 0
        context += MASTER * aux if spec.norms_aux else 0
        entry = item * (2 * hidden + 2 * keys + 2 * width) + MASTER * 3 * hidden
        diagonal = MASTER * target.num_heads * (steps + 3) // 2  # log-sum-exp, and the weights of on average so many
        attention = item * 2 * queries + diagonal + (MASTER * queries if item != MASTER else 0)  # o unrounded, too
        mlp = item * (hidden + 4 * target.intermediate_size) + MASTER * 2 * hidden
        exit_ = item * hidden + MASTER * 2 * hidden  # gradient of the loss, final norm
        layers = 1 if work.recompute else steps
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
    def of(cls, spec: Eagle3Spec, work: Work, formula: ShardFormula) -> _Block0Bytes:
        ulysses, item, samples = formula.ulysses_size, ITEM_BYTES[work.dtype], work.samples
        queries, keys = spec.target.widths
        repeats = key_value_repeats(spec.target.num_heads, spec.target.num_kv_heads, ulysses)
        queries, keys = queries // ulysses, keys * repeats // ulysses
        circulates = formula.ring_size > 1 and not work.gather_once
        slots = ulysses * formula.parts * formula.chunk(work.num_tokens) if circulates else work.num_tokens
        kept, gradient = item * 2 * keys, MASTER * 2 * keys
        travelling = kept + 2 * gradient if circulates else 0  # the next keys; gradients on their way in, and out
        at_once = samples if formula.size == 1 else 1  # a tile of a ring is of one sample
        kernel = at_once * slots * item * 4 * queries
        return cls(samples * slots * kept, samples * slots * (2 * gradient + travelling) + kernel)
