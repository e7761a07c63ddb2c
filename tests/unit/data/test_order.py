"""Orders and seeds depend on the run's seed alone and stay the same whatever numpy comes."""

from __future__ import annotations

import numpy as np

from torchspec.contracts import HELDOUT_EPOCH
from torchspec.data.order import epoch_order, sample_seed


def test_an_order_is_a_permutation():
    for n in (0, 1, 2, 1000):
        assert sorted(epoch_order(3, 0, n).tolist()) == list(range(n))


def test_seed_and_epoch_change_the_order():
    orders = [epoch_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (HELDOUT_EPOCH, 0, 1)]
    assert len({tuple(order) for order in orders}) == 6
    assert epoch_order(1, 1, 100).tolist() == orders[-1]


def test_orders_are_pinned():
    """A resumed run must meet the order that it was started with."""
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(2**31 - 1, 5, 10).tolist() == [9, 7, 4, 3, 0, 6, 1, 8, 5, 2]


def test_first_places_are_uniform():
    first = np.array([epoch_order(seed, 0, 10)[0] for seed in range(2000)])
    assert np.bincount(first, minlength=10).min() > 140


def test_sample_seeds_fit_31_bits_and_differ():
    seeds = {sample_seed(7, epoch, prompt) for epoch in range(HELDOUT_EPOCH, 20) for prompt in range(100)}
    assert len(seeds) == 2100
    assert min(seeds) >= 0
    assert 2**30 < max(seeds) < 2**31
    assert sample_seed(0, 0, 0) == 568543427
    assert sample_seed(0, 0, 1) != sample_seed(0, 1, 0)
