"""Ranks that share samples, end to end: shards in a real store, the fetcher, real Ray processes, gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.trainer_harness import (
    GEOMETRY,
    TTT,
    Bench,
    Outcome,
    Step,
    make_config,
    put_samples,
    run_script,
)
from torchspec.drafts.eagle3.model import Batch
from torchspec.shards import ShardFormula
from torchspec.store.geometry import shard_suffix
from torchspec.training.fetch import SampleFetcher

LENGTHS = (37, 9, 22, 5, 1, 16)
"""One is shorter than any number of ranks; 9 and 1 have no multiple of anything."""


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one rank makes of the samples."""
    return train(bench, tmp_path_factory.mktemp("alone"), {}, None, 1)


def train(bench: Bench, folder: Path, training: dict[str, Any], sharding: ShardFormula | None, world: int) -> Outcome:
    prefix = folder.name
    refs = put_samples(bench.client, LENGTHS, prefix=prefix, unsupervised=(3,), sharding=sharding)
    heldout = put_samples(bench.client, [12, 30], prefix=f"{prefix}-heldout", first=50, sharding=sharding)
    config = make_config(bench.target, folder / "run", evaluation={"heldout": "unused"}, training=training)
    steps = [Step(refs), Step(refs[3:4]), Step(refs[:4], evaluate=True)]  # the second has no loss token at all
    outcome = run_script(config, bench.endpoint, steps, world=world, heldout=heldout)
    for ref in (*refs, *heldout):
        bench.client.remove(ref.key, replace(GEOMETRY, sharding=sharding).suffixes)
    return outcome


@pytest.mark.parametrize(
    ("ulysses", "ring", "dp", "layout", "sharding"),
    [
        pytest.param(2, 1, 1, "contiguous", "fsdp2", marks=pytest.mark.slow),
        (1, 2, 1, "zigzag", "replicated"),
        pytest.param(2, 2, 1, "zigzag", "fsdp2", marks=pytest.mark.slow),
        (2, 1, 2, "zigzag", "fsdp2"),
    ],
)
def test_shared_samples_train_the_same_draft(
    bench: Bench, alone: Outcome, tmp_path: Path, ulysses: int, ring: int, dp: int, layout: Any, sharding: str
) -> None:
    training = {
        "attention_backend": "usp",
        "sp_ulysses_size": ulysses,
        "sp_ring_size": ring,
        "sp_layout": layout,
        "sharding": sharding,
        "dp_size": dp,
    }
    formula = ShardFormula(ulysses, ring, layout, TTT)
    outcome = train(bench, tmp_path, training, formula, ulysses * ring * dp)
    assert outcome.errors == []
    assert [r.tokens for r in outcome.reports] == [r.tokens for r in alone.reports] == [90, 5, 73, 42]
    for ours, theirs in zip(outcome.reports, alone.reports, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert ours.accuracy == theirs.accuracy
    for name, weight in alone.weights.items():  # Adam divides by tiny gradients, so single elements may differ more
        moved = (weight - alone.start[name]).norm()
        assert moved > 0.01
        assert (outcome.weights[name] - weight).norm() < 1e-4 * moved


def test_a_rank_reads_its_own_shard_and_nothing_else(bench: Bench) -> None:
    """Every row of a sample reaches exactly one rank; besides, each reads its halo."""
    length, formula = 203, ShardFormula(2, 2, "zigzag", TTT)
    (whole,) = put_samples(bench.client, [length], prefix="whole")
    (ref,) = put_samples(bench.client, [length], prefix="shards", sharding=formula)
    assert ref.sharding == formula and ref.tensors == whole.tensors  # global shapes
    full = SampleFetcher(bench.client, GEOMETRY, 0, 0, pin_memory=False)
    ([expected], _) = full.fetch(((whole,),), {})
    seen = torch.zeros(length, dtype=torch.int64)
    row_bytes = 4 * (GEOMETRY.num_aux + 1) * GEOMETRY.hidden_size + 4
    for rank in range(formula.size):
        fetcher = SampleFetcher(bench.client, replace(GEOMETRY, sharding=formula), rank, 0, pin_memory=False)
        ([batch], missing) = fetcher.fetch(((ref,),), {})
        assert not missing and torch.equal(batch.loss_mask_BS, expected.loss_mask_BS)
        check_windows(batch, expected, formula, rank, seen)
        owned = -(-length // (2 * formula.size)) * 2
        assert fetcher.bytes_read <= row_bytes * (owned + 2 * TTT)
    assert (seen == 1).all()


def check_windows(batch: Batch, expected: Batch, formula: ShardFormula, rank: int, seen: torch.Tensor) -> None:
    for row, segment in enumerate(formula.segments(len(seen), rank)):
        seen[segment.start : segment.stop] += 1
        owned, readable = slice(segment.start, segment.stop), slice(segment.start, segment.halo_stop)
        for ours, theirs, rows in (
            (batch.hs_BSA, expected.hs_BSA, owned),
            (batch.lhs_BSH, expected.lhs_BSH, readable),
            (batch.ids_BS, expected.ids_BS, readable),
        ):
            filled = rows.stop - rows.start
            assert torch.equal(ours[row, :filled], theirs[0, rows]) and theirs[0, rows].any()
            assert not ours[row, filled:].any()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard_is_reported_by_the_rank_that_reads_it(bench: Bench, damage: str) -> None:
    formula = ShardFormula(1, 2, "contiguous", TTT)
    (ref,) = put_samples(bench.client, [40], prefix=damage, sharding=formula)
    name = shard_suffix(1, "lhs")
    bench.client.remove(ref.key, [name])
    if damage == "truncated":
        whole = replace(GEOMETRY, sharding=formula).shard(40, 1)[name]
        short = replace(whole, shape=(whole.shape[0] - 1, *whole.shape[1:]))
        bench.client.put(ref.key, bench.client.allocate({name: short})).result(timeout=60)
    reported = []
    for rank in range(2):
        fetcher = SampleFetcher(bench.client, replace(GEOMETRY, sharding=formula), rank, 0, pin_memory=False)
        reported.append(fetcher.fetch(((ref,),), {})[1])
    assert reported == [set(), {ref.sample}]
