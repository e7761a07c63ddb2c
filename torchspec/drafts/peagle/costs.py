"""What a P-EAGLE step costs, from shapes alone: operations and memory.

Counted for the worst sample, whose tokens are all to be learnt, so that all rows are context and active. Memory is that
of the peak of a step, which comes where the backward starts: all activations are there, and either the logits of a
chunk, or the gradients inside the last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.spec import MASTER, RankBytes, Work

if TYPE_CHECKING:
    from torchspec.drafts.peagle.spec import PEagleSpec


def flops(spec: PEagleSpec, tokens: int, scored: int) -> float:
    """Operations of forward and backward on one sample; a multiply-add counts as two.

    S tokens, N of them scored, K positions, L layers; H hidden, Q and W widths of queries and of keys, M of the MLP,
    D and V vocabularies of draft and target. The first layer's q, k and v are twice as wide, but at later positions
    they are those of a single row:

        once            fc: S * (aux * H) * H       keys and values of position 0: S * (L + 1) * H * 2W
        layers          q, o: 2H * Q and MLP: 3 * H * M, for S rows in all layers but the last, N in that, and
                        for N in each layer at each of the K - 1 later positions, whose keys and values are H * 2W
        attention       2 * Q for each pair: S * S / 2 in all layers but the last, N * (S - N / 2) for all else
        head            K * N * H * D
        teacher         N * H * V, forward only

    Trained matrices cost three times their forward.
    """
    target, (queries, keys) = spec.target, spec.target.widths
    hidden, layers, later = target.hidden_size, spec.num_layers, spec.num_positions - 1
    context = (layers - 1) * tokens + scored
    chains = later * layers * scored
    once = tokens * hidden * (len(spec.layers) * hidden + (layers + 1) * 2 * keys)
    rows = (context + chains) * (2 * hidden * queries + 3 * hidden * target.intermediate_size)
    own = later * (layers - 1) * scored * 2 * hidden * keys
    pairs = (layers - 1) * tokens**2 / 2 + (1 + later * layers) * scored * (tokens - scored / 2)
    head = spec.num_positions * scored * hidden * spec.draft_vocab_size
    teacher = scored * hidden * target.vocab_size
    return 2.0 * (3 * (once + rows + own + 2 * queries * pairs + head) + teacher)


def rank_bytes(spec: PEagleSpec, work: Work) -> RankBytes:
    """Peak of a micro-batch. Inputs of matmuls are kept in the dtype of the run, those of norms in float32."""
    assert work.sharding is None, "samples are whole"
    target, item, (queries, keys) = spec.target, ITEM_BYTES[work.dtype], spec.target.widths
    hidden, width, wide = target.hidden_size, target.head_dim, target.intermediate_size
    positions, layers = spec.num_positions, spec.num_layers
    later, rows, aux = positions - 1, work.samples * work.num_tokens, len(spec.layers) * hidden
    computed = 1 if work.recompute else layers * positions
    context = item * aux + (MASTER * aux if spec.fc_norm else 0) + item * 2 * width
    first = item * (2 * hidden + 2 * width) + MASTER * 3 * hidden + later * item * (keys + 4 * width)
    gathered = item * ((hidden if layers > 1 else 2 * hidden) + 2 * width)  # the active rows of the last layer
    others = (layers - 1) * positions * ((item + 2 * MASTER) * hidden + item * 2 * keys)
    diagonal = MASTER * target.num_heads * (positions + 3) // 2  # log-sum-exp, and the weights of on average so many
    attention = item * 2 * queries + diagonal + (MASTER * queries if item != MASTER else 0)  # o unrounded, too
    mlp = item * (hidden + 4 * wide) + MASTER * 2 * hidden
    exit_ = item * hidden + MASTER * 2 * hidden  # gradient of the loss, final norm
    kept = context + first + others + gathered + computed * (attention + mlp) + positions * exit_
    leaving_loss = rows * positions * item * hidden + spec.logits_bytes(work, rows)
    in_attention = rows * (positions * item * hidden + 6 * MASTER * queries) + rows * 4 * item * queries
    return RankBytes(rows * kept, layers * rows * item * 2 * keys, max(leaving_loss, in_attention))
