"""Threads are shared, never given out twice."""

from __future__ import annotations

import pytest

from torchspec.config.load import parse_config
from torchspec.driver.plan import ThreadPlan, plan_threads


@pytest.mark.parametrize(
    ("workers", "ranks", "cores", "expected"), [(1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 16, 8), (3, 1, 16, 4), (9, 1, 2, 1)]
)
def test_auto_shares_the_cores(workers, ranks, cores, expected):
    config = parse_config({"target": {"path": "x"}, "inference": {"workers": workers}, "training": {"dp_size": ranks}})
    assert plan_threads(config, cores, on_gpu=False) == ThreadPlan(expected, expected)


def test_numbers_in_the_config_are_taken_as_they_are():
    config = parse_config({"target": {"path": "x"}, "inference": {"threads": 3}, "training": {"threads": 5}})
    assert plan_threads(config, 2, on_gpu=False) == ThreadPlan(3, 5)
