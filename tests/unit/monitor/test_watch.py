"""Rates and courses of what is followed."""

from __future__ import annotations

import pytest

from torchspec.monitor.watch import course, growth


def test_rates_are_growth_over_time() -> None:
    history = [{"time": float(t), "n": n} for t, n in enumerate([0, 10, 20, 20, 20, 0, 30])]
    assert growth(history, "n", 3) == [10.0, 0.0, 5.0]
    assert growth(history, "n", 6) == [10.0, 10.0, 0.0, 0.0, 0.0, 30.0]
    assert growth(history[:1], "n", 5) == []


def test_curves_are_over_time_where_old_points_lie_further_apart() -> None:
    times = [*range(0, 100, 20), *range(100, 111)]
    history = [{"time": float(t), "n": 3 * t, "depth": float(t)} for t in times]
    assert growth(history, "n", 11) == pytest.approx([3.0] * 11)
    depths = course(history, "depth", 11)
    assert len(depths) == 11 and depths == sorted(depths)
    assert depths[:2] == [10.0, 10.0] and depths[-1] == 105.0
