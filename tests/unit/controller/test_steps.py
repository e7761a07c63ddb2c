"""Splitting a step over ranks."""

from __future__ import annotations

import pytest

from tests.calls import calls
from torchspec.contracts import SampleId, SampleRef
from torchspec.controller.steps import split_batch


def refs(*tokens: int) -> list[SampleRef]:
    return [SampleRef(SampleId(0, i), f"k{i}", n, b"", {}, 1, "post_norm") for i, n in enumerate(tokens)]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_sample_once_and_equal_micro_batch_counts(dp_size: int, micro: int, count: int):
    batch = refs(*[(i * 37) % 90 + 1 for i in range(count)])
    ranks = split_batch(batch, dp_size, micro)
    assert len(ranks) == dp_size and len({len(r) for r in ranks}) == 1
    assert sorted(s.key for r in ranks for m in r for s in m) == sorted(s.key for s in batch)
    assert all(len(m) <= micro for r in ranks for m in r)
    assert max(sum(len(m) for m in r) for r in ranks) <= -(-count // dp_size)


def test_tokens_are_balanced_and_order_of_arrival_does_not_matter():
    batch = refs(100, 10, 90, 20, 80, 30)
    ranks = split_batch(batch, 2, 3)
    loads = [sum(s.num_tokens for m in r for s in m) for r in ranks]
    assert abs(loads[0] - loads[1]) <= 30  # in order of arrival it would be 70
    assert split_batch(batch[::-1], 2, 3) == ranks


def test_a_large_step_is_split_in_the_time_that_sorting_takes():
    batch = refs(*[(i * 7919) % 4096 + 1 for i in range(4096)])
    assert calls(lambda: split_batch(batch, 64, 4)) < 15 * len(batch)
    loads = [sum(ref.num_tokens for micro in rank for ref in micro) for rank in split_batch(batch, 64, 4)]
    assert sum(loads) == 4096 * 4097 // 2 and max(loads) - min(loads) < 64


def test_no_samples_still_gives_every_rank_a_micro_batch():
    assert split_batch([], 2, 4) == [((),), ((),)]
