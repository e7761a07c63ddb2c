"""What a rank is expected to need: against what a real forward keeps, and how it changes with the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.autograd_memory import kept_by_a_forward
from torchspec.config.schema import TrainingConfig
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.driver.memory import GPU_SHARE, MemoryBudget, Split, host_bytes, possible_splits, rank_memory
from torchspec.target.shape import TargetShape

TARGET = TargetShape(
    hidden_size=96,
    num_heads=12,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=200,
    rms_norm_eps=1e-5,
    vocab_size=300,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
DRAFT = Eagle3Spec(TARGET, layers=(1, 2, 3), draft_vocab_size=200, ttt_length=3)
NORMS = {"norm_before_fc": True, "norm_output": True}
TOKENS = 960
"""A multiple of every number of chunks below."""


def training_of(ulysses: int = 1, ring: int = 1, **changes: Any) -> TrainingConfig:
    backend = "usp" if ulysses * ring > 1 else "flash"
    defaults = {
        "dtype": "float32",
        "batch_size": 1,
        "micro_batch_size": 1,
        "loss_chunk_tokens": 1024,
        "buffer_bytes": 1 << 28,
    }
    return TrainingConfig(
        attention_backend=backend, sp_ulysses_size=ulysses, sp_ring_size=ring, **{**defaults, **changes}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes", [{"ttt_length": 1}, {"ttt_length": 1, "fc_norm": True}, {"ttt_length": 7}, {"ttt_length": 7, **NORMS}]
)
def test_activations_are_what_a_forward_keeps(changes: dict[str, Any], dtype: str) -> None:
    training = training_of(dtype=dtype, batch_size=2, micro_batch_size=2)
    spec = replace(DRAFT, **changes)
    memory = rank_memory(spec, training, TOKENS, "bfloat16")
    kept = kept_by_a_forward(Eagle3Draft(spec), dtype, 2, TOKENS)
    assert 0.98 * kept < memory.activations + memory.keys_values < 1.1 * kept


def test_a_larger_loss_chunk_and_vocabulary_take_more() -> None:
    small, large = (rank_memory(DRAFT, training_of(loss_chunk_tokens=n), TOKENS, "bfloat16") for n in (64, 2048))
    assert large.temporaries > small.temporaries and large.activations == small.activations
    more = rank_memory(replace(DRAFT, target=replace(TARGET, vocab_size=4000)), training_of(), TOKENS, "bfloat16")
    assert more.target_head - small.target_head == 2 * 3700 * 96 * 4


def test_checkpointing_keeps_less_and_bfloat16_too() -> None:
    plain, checkpointed, low = (
        rank_memory(replace(DRAFT, ttt_length=7), training_of(**changes), TOKENS, "bfloat16").activations
        for changes in ({}, {"activation_checkpointing": True}, {"dtype": "bfloat16"})
    )
    assert checkpointed < 0.6 * plain and 0.5 * plain < low < 0.75 * plain


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_each_split_shares(layout: Any) -> None:
    def memory(ulysses: int, ring: int, gather_once: bool = True) -> Any:
        training = training_of(ulysses, ring, sp_layout=layout, sp_gather_once=gather_once)
        return rank_memory(DRAFT, training, TOKENS, "bfloat16")

    alone = memory(1, 1)
    for ulysses, ring in ((4, 1), (2, 2), (1, 4)):
        assert memory(ulysses, ring).activations == alone.activations // 4
        halo = 3 * (1 if layout == "contiguous" else 2)
        assert memory(ulysses, ring).inputs == (TOKENS // 4 + halo) * (4 * 96 * 2 + 4)
    assert memory(1, 4).keys_values == alone.keys_values, "gathered: all positions, all heads"
    assert memory(2, 2).keys_values == alone.keys_values // 2
    assert memory(4, 1).keys_values == memory(1, 4, gather_once=False).keys_values == alone.keys_values // 4
    assert memory(12, 1).keys_values == alone.keys_values // 4, "four key/value heads, each on three ranks"
    with pytest.raises(ValueError, match="sp_ulysses_size=8 does not divide the draft's 12 query heads"):
        memory(8, 1)


def test_weights_and_their_sharding() -> None:
    parameters = sum(p.numel() for p in Eagle3Draft(DRAFT).parameters())
    assert DRAFT.parameters() == parameters
    whole, sharded = (
        rank_memory(DRAFT, training_of(1, 4, dp_size=2, batch_size=2, sharding=sharding), TOKENS, "bfloat16").weights
        for sharding in ("replicated", "fsdp2")
    )
    assert (whole, sharded) == (16 * parameters, 16 * parameters // 8 + 8 * parameters)


def test_fetched_samples_are_shared() -> None:
    alone, shared = (host_bytes(DRAFT, t, TOKENS, 6, "bfloat16") for t in (training_of(), training_of(1, 4)))
    fetched = 6 * TOKENS * (4 * 96 * 2 + 4)
    assert alone - shared == pytest.approx(fetched * 3 / 4, rel=0.03)


def splits_of(training: TrainingConfig, budget: MemoryBudget, tokens: int = TOKENS) -> dict[tuple[int, int], Split]:
    return {(s.ulysses, s.ring): s for s in possible_splits(DRAFT, training, tokens, 2, "bfloat16", budget)}


def test_the_splits_that_heads_allow() -> None:
    plenty = MemoryBudget(1 << 40)
    splits = splits_of(training_of(), plenty)
    two, three, four = [(2, 1), (1, 2)], [(3, 1), (1, 3)], [(4, 1), (2, 2), (1, 4)]
    six, eight = [(6, 1), (3, 2), (2, 3), (1, 6)], [(4, 2), (2, 4), (1, 8)]
    assert list(splits) == [(1, 1), *two, *three, *four, *six, *eight]
    assert [split for split, s in splits.items() if s.configured] == [(1, 1)]
    assert not any(s.obstacle for s in splits.values())
    own = splits_of(training_of(6, 3, dp_size=2, batch_size=2), plenty)
    assert own[6, 3].configured and own[6, 3].ranks == 36 and len(own) == 16


def test_on_gpus_more_ranks_have_room_for_longer_samples() -> None:
    budget = MemoryBudget(1 << 40, gpus=4, gpu_bytes=64 << 20)
    training = training_of(sp_gather_once=False)
    splits = splits_of(training, budget, 4096)
    assert splits[1, 1].obstacle == "memory" and splits[1, 4].obstacle == ""
    assert splits[1, 8].obstacle == "8 GPUs, 4 are left"
    longest = [splits[1, n].longest for n in (1, 2, 4)]
    assert longest[0] < longest[1] < longest[2]
    for split, tokens in zip(((1, 1), (1, 2), (1, 4)), longest, strict=True):
        own = training_of(*split, sp_gather_once=False)
        fits, not_any_more = (rank_memory(DRAFT, own, n, "bfloat16").total for n in (tokens, tokens + 8))
        assert fits <= 64 * GPU_SHARE * 2**20 < not_any_more


def test_on_cpus_all_ranks_share_the_memory() -> None:
    splits = splits_of(training_of(), MemoryBudget(5 << 30))
    assert not any(s.obstacle for (ulysses, ring), s in splits.items() if ulysses * ring <= 2)
    assert splits[1, 8].obstacle == "memory"
    assert splits[1, 2].rank_bytes * 2 > splits[1, 1].rank_bytes > splits[1, 2].rank_bytes
