"""Which ways to share a sample among ranks, Ulysses x ring, fit the memory that the training ranks have."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from torchspec.config.schema import TrainingConfig
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.driver.memory import host_bytes, rank_memory

DEGREES = (1, 2, 3, 4, 6, 8)
"""Ranks of a sample that are looked at, beside the configured number."""
LONGEST = 1 << 24
"""Tokens; no sample is longer."""
GPU_SHARE = 0.9
"""Of a GPU's memory; the rest is for CUDA, NCCL and fragmentation."""


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

    @property
    def size(self) -> int:
        """Ranks that share a sample."""
        return self.ulysses * self.ring


def possible_splits(
    draft: Eagle3Spec, training: TrainingConfig, num_tokens: int, kept: int, state_dtype: str, room: MemoryBudget
) -> tuple[Split, ...]:
    """The configured split and all others of a few degrees whose Ulysses ranks divide the draft's query heads.

    Args:
        training: with its dtype resolved.
        num_tokens: of the longest sample.
        kept: samples that all ranks together keep in host memory.
        state_dtype: what the target's hidden states are stored in.
    """
    configured = training.sp_ulysses_size, training.sp_ring_size
    sizes = {
        (ulysses, degree // ulysses)
        for degree in DEGREES
        for ulysses in range(1, degree + 1)
        if degree % ulysses == 0 and draft.num_heads % ulysses == 0
    }
    ordered = sorted(sizes | {configured}, key=lambda split: (split[0] * split[1], -split[0]))
    return tuple(
        _split(draft, _with_split(training, *split), num_tokens, kept, state_dtype, room, split == configured)
        for split in ordered
    )


def _with_split(training: TrainingConfig, ulysses: int, ring: int) -> TrainingConfig:
    if (ulysses, ring) == (training.sp_ulysses_size, training.sp_ring_size):
        return training
    backend = "usp" if ulysses * ring > 1 else "flash"
    sizes = {"sp_ulysses_size": ulysses, "sp_ring_size": ring}
    return training.model_copy(update={"attention_backend": backend, **sizes})


def _split(
    draft: Eagle3Spec,
    training: TrainingConfig,
    num_tokens: int,
    kept: int,
    state_dtype: str,
    room: MemoryBudget,
    configured: bool,
) -> Split:
    ranks = training.world_size

    def needed(tokens: int) -> int:
        device = rank_memory(draft, training, tokens, state_dtype).total
        return device if room.gpus is not None else device + host_bytes(draft, training, tokens, kept, state_dtype)

    limit = room.host_bytes // ranks if room.gpus is None else int(room.gpu_bytes * GPU_SHARE)
    longest = bisect_right(range(1, LONGEST), limit, key=needed)
    obstacle = "" if num_tokens <= longest else "memory"
    if room.gpus is not None and ranks > room.gpus:
        obstacle = f"{ranks} GPUs, {room.gpus} are left"
    return Split(
        ulysses=training.sp_ulysses_size,
        ring=training.sp_ring_size,
        ranks=ranks,
        rank_bytes=needed(num_tokens),
        longest=longest,
        obstacle=obstacle,
        configured=configured,
    )
