"""The learning-rate schedule: shape, ends and edges of each kind."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from torchspec.config.schema import OptimizerConfig
from torchspec.training.schedule import Schedule, learning_rate

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


def rates_after(resumes: list[tuple[int, int]], total: int, **knobs: object) -> list[float]:
    """Of every step of a run that was to have ``total`` steps, with the resumes' step and new total."""
    config = OptimizerConfig.model_validate({"lr": 2.0, **knobs})
    schedule, got = Schedule(((0, total),)), list[float]()
    for step, longer in [*resumes, (None, None)]:
        got += [schedule.rate(i, config) for i in range(len(got) + 1, (step or schedule.total) + 1)]
        if step is not None:
            schedule = schedule.bent(step, longer, config)
    return got


@pytest.mark.parametrize("knobs", [{"schedule": kind, "warmup_ratio": 0.1} for kind in ("cosine", "linear", "wsd")])
@pytest.mark.parametrize("resumes", [[(40, 160)], [(40, 60)], [(40, 160), (100, 120)], [(5, 200)], [(90, 300)]])
def test_a_resume_with_other_steps_goes_on_at_its_rate_and_comes_to_the_same_end(
    knobs: dict[str, object], resumes: list[tuple[int, int]]
) -> None:
    """Public bug reports 25: the rate jumped up by orders of magnitude."""
    got, undisturbed = rates_after(resumes, TOTAL, **knobs), rates(**knobs)
    assert len(got) == resumes[-1][1] and got[: resumes[0][0]] == undisturbed[: resumes[0][0]]
    steepest = max(abs(a - b) for a, b in pairwise(undisturbed))
    assert max(abs(a - b) for a, b in pairwise(got)) <= 3.1 * steepest  # [40, 60] goes the same way in a third
    assert got[-1] == pytest.approx(undisturbed[-1])


def test_a_resume_with_the_same_steps_changes_no_bit() -> None:
    assert rates_after([(7, 30), (20, 30)], 30) == rates(30)
    assert rates_after([(7, 60), (9, 60), (33, 60)], 30) == rates_after([(7, 60)], 30)


def test_half_of_a_linear_way_is_left_for_three_times_the_steps() -> None:
    got = rates_after([(50, 200)], TOTAL, schedule="linear", warmup_ratio=0.0)
    assert [a - b for a, b in pairwise(got[50:])] == pytest.approx([1 / 150] * 149)


def test_a_rate_that_has_come_to_its_end_is_not_stretched() -> None:
    schedule, config = Schedule(((0, TOTAL),)), OptimizerConfig(lr=2.0)
    with pytest.raises(ValueError, match=r"has come to its end .* in the 100 steps .* so 200 would teach nothing"):
        schedule.bent(TOTAL, 2 * TOTAL, config)
    assert schedule.bent(TOTAL, TOTAL // 2, config).total == TOTAL // 2, "nothing follows"
    for held in (OptimizerConfig(lr=2.0, min_lr_ratio=0.1), OptimizerConfig(lr=2.0, schedule="constant")):
        rate = schedule.rate(TOTAL, held)
        longer = schedule.bent(TOTAL, 2 * TOTAL, held)
        assert longer.rate(TOTAL + 1, held) == longer.rate(2 * TOTAL, held) == pytest.approx(rate, rel=1e-2)
