"""Percentiles from histograms, and rates over the last while."""

from __future__ import annotations

import pytest

from tests.clock import Clock
from torchspec.instruments import BOUNDS, EMPTY, Rate, observe, percentile, since


def test_percentiles_are_within_a_bucket_of_the_truth() -> None:
    latencies = [0.0005 + 0.0013 * i for i in range(1000)]
    histogram = EMPTY
    for seconds in latencies:
        histogram = observe(histogram, seconds)
    assert sum(histogram) == 1000
    for share in (0.01, 0.5, 0.9, 0.99):
        truth, estimate = latencies[int(share * 1000)], percentile(histogram, share)
        assert estimate is not None
        bounds = [0.0, *BOUNDS]
        slot = next(i for i, bound in enumerate(BOUNDS) if truth <= bound)
        assert bounds[slot] <= estimate <= BOUNDS[slot]
    assert percentile(EMPTY, 0.5) is None
    assert percentile(observe(EMPTY, 1e9), 0.5) == BOUNDS[-1]
    assert since(histogram, histogram) == EMPTY


@pytest.mark.parametrize("gap", [1.0, 5.0, 45.0])
def test_a_rate_is_right_from_the_second_piece_on_and_between_pieces(clock: Clock, gap: float) -> None:
    rate = Rate(clock)
    for piece in range(50):
        rate.add(16, 1600)
        if piece:
            for _ in range(4):
                assert rate.samples_per_s == pytest.approx(16 / gap)
                assert rate.tokens_per_s == pytest.approx(1600 / gap)
                clock.now += gap / 4
        else:
            assert rate.samples_per_s == 0.0
            clock.now += gap


def test_pieces_that_come_together_are_no_burst_of_speed(clock: Clock) -> None:
    rate = Rate(clock)
    for _ in range(4):
        for _ in range(32):
            rate.add(1, 10)
            assert rate.samples_per_s <= 32
        clock.now += 10.0
    assert rate.samples_per_s == pytest.approx(3.2, rel=0.3)


def test_a_rate_falls_when_nothing_comes_any_more(clock: Clock) -> None:
    rate = Rate(clock)
    for _ in range(60):
        rate.add(1, 10)
        clock.now += 1.0
    clock.now += 60
    assert rate.samples_per_s < 0.1
    clock.now += 3600
    assert rate.samples_per_s < 0.01
