"""What a training rank keeps in memory, and which ways to share samples among ranks, Ulysses x ring, fit what there is.

A draft's own part is its spec's to say (``DraftSpec.rank_bytes``); weights, the target's head and what comes from the
store are the same for every kind.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields

from torchspec.config.schema import TrainingConfig
from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.spec import DraftSpec, Work
from torchspec.knobs import found
from torchspec.shards import ShardFormula

MASTER = 4
"""Bytes of an element of the weights' masters, their gradients and moments: float32."""
PROCESS_BYTES = 1 << 30
"""A rank's interpreter and libraries, and what no formula counts."""
DEGREES = (1, 2, 3, 4, 6, 8)
"""Ranks of a sample that are looked at, beside the configured number."""
LONGEST = 1 << 24
"""Tokens; no sample is longer."""
GPU_SHARE = 0.9
"""Of a GPU's memory; the rest is for CUDA, NCCL and fragmentation."""


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
    keys_values: int
    temporaries: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(draft: DraftSpec, training: TrainingConfig, num_tokens: int, state_dtype: str) -> RankMemory:
    """Peak of a step whose samples all have ``num_tokens`` tokens.

    Args:
        training: resolved.
        state_dtype: what the target's hidden states are stored in.

    Raises:
        ValueError: the draft's heads cannot be split over ``training.sp_ulysses_size`` ranks.
    """
    sharding = training.shard_formula(draft.halo)
    samples = min(training.micro_batch_size, -(-training.batch_size // training.dp_size))
    work = Work(
        samples=samples,
        num_tokens=num_tokens,
        sharding=sharding,
        gather_once=training.sp_gather_once,
        dtype=training.dtype,
        recompute=training.activation_checkpointing,
        loss_chunk_tokens=found(training.loss_chunk_tokens),
    )
    return RankMemory(
        weights=_weights(draft.parameters(), training),
        target_head=2 * draft.target.vocab_size * draft.target.hidden_size * ITEM_BYTES[training.dtype],
        inputs=_input_bytes(draft, sharding, samples, num_tokens, state_dtype),
        **draft.rank_bytes(work)._asdict(),
    )


def host_bytes(draft: DraftSpec, training: TrainingConfig, num_tokens: int, kept: int, state_dtype: str) -> int:
    """Host memory of a rank beside what :func:`rank_memory` counts: libraries, the store's buffer, fetched samples.

    Args:
        kept: samples that all ranks together hold at the same time.
    """
    sharding, samples = training.shard_formula(draft.halo), -(-kept // training.dp_size)
    fetched = _input_bytes(draft, sharding, samples, num_tokens, state_dtype)
    return PROCESS_BYTES + found(training.buffer_bytes) + fetched


def _input_bytes(
    draft: DraftSpec, sharding: ShardFormula | None, samples: int, num_tokens: int, state_dtype: str
) -> int:
    """Of one rank's part of ``samples`` as they come from the store."""
    windows, columns = (samples, num_tokens) if sharding is None else sharding.window_shape([num_tokens] * samples)
    states = (len(draft.layers) + 1) * draft.target.hidden_size * ITEM_BYTES[state_dtype]
    return windows * columns * (states + ITEM_BYTES["int32"])


def _weights(parameters: int, training: TrainingConfig) -> int:
    item = ITEM_BYTES[training.dtype]
    cast = parameters * item if item != MASTER else 0  # autocast keeps its copies
    if training.sharding == "replicated" or training.world_size == 1:
        return 4 * MASTER * parameters + cast
    gathered = 2 * MASTER * parameters  # weights and gradients of the whole draft
    return 4 * MASTER * parameters // training.world_size + gathered + cast


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What the training ranks of a run can have."""

    host_bytes: int
    """Of this machine's memory, what other processes leave."""
    gpus: int | None = None
    """GPUs that engines leave; None where ranks compute on CPUs, in the host's memory."""
    gpu_bytes: int = 0
    """Memory of one."""


@dataclass(frozen=True, slots=True)
class Split:
    """One way to share samples."""

    ulysses: int
    ring: int
    ranks: int
    """All ranks of the run, data-parallel ones too."""
    rank_bytes: int
    """Expected of one rank: on a GPU its device's memory, else the host's."""
    longest: int
    """Tokens of the longest sample that fits."""
    obstacle: str
    """Why it cannot be; empty where it can."""
    configured: bool


def possible_splits(
    draft: DraftSpec, training: TrainingConfig, num_tokens: int, kept: int, state_dtype: str, budget: MemoryBudget
) -> tuple[Split, ...]:
    """The configured split and all others of a few degrees whose Ulysses ranks divide the draft's query heads.

    Args:
        training: resolved.
        num_tokens: of the longest sample.
        kept: samples that all ranks together keep in host memory.
        state_dtype: what the target's hidden states are stored in.
    """
    on_gpu, configured = budget.gpus is not None, (training.sp_ulysses_size, training.sp_ring_size)
    sizes = {
        (ulysses, degree // ulysses)
        for degree in (DEGREES if draft.halo is not None else ())
        for ulysses in range(1, degree + 1)
        if degree % ulysses == 0 and draft.target.num_heads % ulysses == 0
    }

    def split_over(ulysses: int, ring: int) -> Split:
        own = training if (ulysses, ring) == configured else _with_split(training, ulysses, ring)
        ranks = own.world_size

        def needed(tokens: int) -> int:
            device = rank_memory(draft, own, tokens, state_dtype).total
            return device if on_gpu else device + host_bytes(draft, own, tokens, kept, state_dtype)

        limit = int(budget.gpu_bytes * GPU_SHARE) if on_gpu else budget.host_bytes // ranks
        longest = bisect_right(range(1, LONGEST), limit, key=needed)
        obstacle = "" if num_tokens <= longest else "memory"
        if budget.gpus is not None and ranks > budget.gpus:
            obstacle = f"{ranks} GPUs, {budget.gpus} are left"
        return Split(ulysses, ring, ranks, needed(num_tokens), longest, obstacle, (ulysses, ring) == configured)

    ordered = sorted(sizes | {configured}, key=lambda split: (split[0] * split[1], -split[0]))
    return tuple(split_over(*split) for split in ordered)


def _with_split(training: TrainingConfig, ulysses: int, ring: int) -> TrainingConfig:
    backend = "usp" if ulysses * ring > 1 else "flash"
    sizes = {"sp_ulysses_size": ulysses, "sp_ring_size": ring}
    return training.model_copy(update={"attention_backend": backend, **sizes})
