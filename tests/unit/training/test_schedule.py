"""The learning-rate schedule: shape, ends and edges of each kind."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from torchspec.config.schema import OptimizerConfig
from torchspec.training.optimizer import learning_rate

TOTAL = 100


def rates(total: int = TOTAL, **knobs: object) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": 2.0, **knobs})
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(warmup_ratio=0.1, schedule="constant")[:11] == pytest.approx([0.2 * i for i in range(1, 11)] + [2.0])


def test_cosine_follows_its_formula() -> None:
    got = rates(warmup_ratio=0.0, schedule="cosine", min_lr_ratio=0.1)
    assert got == pytest.approx([0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * i / TOTAL)) for i in range(TOTAL)])


def test_linear_falls_by_equal_amounts_to_the_end() -> None:
    got = rates(warmup_ratio=0.1, schedule="linear", min_lr_ratio=0.25)
    assert got[10] == pytest.approx(2.0)
    assert [a - b for a, b in pairwise(got[10:])] == pytest.approx([1.5 / 90] * 89)
    assert got[-1] == pytest.approx(0.5 + 1.5 / 90)


def test_wsd_holds_then_decays() -> None:
    got = rates(warmup_ratio=0.1, schedule="wsd", decay_ratio=0.2)
    assert got[9:80] == pytest.approx([2.0] * 71)
    assert got[80:] == pytest.approx([2.0 - 0.1 * i for i in range(20)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_every_step_learns_and_no_step_exceeds_the_peak(schedule: str, total: int) -> None:
    got = rates(total, warmup_ratio=0.03, schedule=schedule)
    assert all(0 < rate <= 2.0 for rate in got)
    assert max(got) == pytest.approx(2.0)


def test_steps_beyond_the_total_stay_at_the_end() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.1)
    assert learning_rate(TOTAL + 50, TOTAL, config) == pytest.approx(0.2)
