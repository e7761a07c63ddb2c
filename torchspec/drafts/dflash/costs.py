"""What a DFlash step costs, from shapes alone: operations and memory.

Counted for the worst sample, whose tokens are all to be learnt: it has as many blocks as it can, and its context is the
whole of it. Memory is that of the peak of a step, which comes where the backward starts: all activations are there, and
either the logits of a chunk, or the gradients inside the last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.spec import MASTER, RankBytes, Work

if TYPE_CHECKING:
    from torchspec.drafts.dflash.spec import DFlashSpec


def flops(spec: DFlashSpec, tokens: int, scored: int) -> float:
    """Operations of forward and backward on one sample; a multiply-add counts as two.

    S tokens, N of them scored, in n = min(N, anchors) blocks of B, so R = n * B rows; H hidden, Q and K widths of
    queries and of keys, M of the MLP, V of the vocabulary:

        once            fc: S * (features * H) * H      head: n * (B - 1) * H * V
        in each layer   q, o: R * 2H * Q    own keys and values: R * 2H * K     MLP: R * 3 * H * M
                        the context's keys and values: S * 2H * K
                        attention: 2 * Q * R * (S - N / 2 + B)      (scored tokens are the last ones)
        teacher         N * H * V, forward only, where the loss asks for it

    Trained matrices cost three times their forward, the target's head two times (no gradient of its weights).
    """
    target, (queries, keys) = spec.target, spec.target.widths
    hidden, blocks = target.hidden_size, min(scored, spec.num_anchors)
    rows = blocks * spec.block_size
    row = 2 * hidden * (queries + keys) + 3 * hidden * target.intermediate_size
    attention = 2 * queries * (tokens - scored / 2 + spec.block_size)
    layer = rows * (row + attention) + tokens * 2 * hidden * keys
    trained = tokens * len(spec.layers) * hidden**2 + spec.num_layers * layer
    vocabulary = hidden * target.vocab_size
    teacher = scored * vocabulary if spec.loss == "soft_ce" else 0
    return 2.0 * (3 * trained + 2 * blocks * spec.positions * vocabulary + teacher)


def rank_bytes(spec: DFlashSpec, work: Work) -> RankBytes:
    """Peak of a micro-batch: rows of blocks, and context rows, whose keys and values are kept for each layer."""
    assert work.sharding is None, "samples are whole"
    target, item, (queries, keys) = spec.target, ITEM_BYTES[work.dtype], spec.target.widths
    hidden, width, wide = target.hidden_size, target.head_dim, target.intermediate_size
    context = work.samples * work.num_tokens
    rows = work.samples * min(work.num_tokens, spec.num_anchors) * spec.block_size
    layers = 1 if work.recompute else spec.num_layers

    def norm(size: int) -> int:
        return (2 * MASTER + item) * size  # its input, twice, and what follows works on

    heads = norm(queries + keys) + item * (keys + 2 * queries) + 2 * MASTER * target.num_heads
    layer = 2 * norm(hidden) + heads + 4 * item * wide
    entries = item * hidden * spec.num_layers if work.recompute else 0
    row = entries + layers * layer + norm(hidden) + 2 * item * width
    shared = item * (len(spec.layers) * hidden + 2 * width) + norm(hidden)
    kept = layers * context * (norm(keys) + item * keys)
    inside = rows * (item * 3 * wide + MASTER * 3 * queries)
    return RankBytes(rows * row + context * shared, kept, max(_logits(spec, work, rows), inside))


def _logits(spec: DFlashSpec, work: Work, rows: int) -> int:
    """Logits of a chunk, in the other dtype too under autocast, and those of the teachers, at most one a student."""
    item, vocab = ITEM_BYTES[work.dtype], spec.target.vocab_size
    students = vocab * (item if item == MASTER else item + MASTER)
    teachers = vocab * MASTER if spec.loss == "soft_ce" else 0
    return min(work.loss_chunk_tokens, rows) * (students + teachers)
