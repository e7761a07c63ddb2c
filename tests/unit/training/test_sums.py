"""From sums to a report."""

from __future__ import annotations

import math

import pytest
import torch

from torchspec.drafts.draft import DraftOutput
from torchspec.training.sums import StepSums, summarise


def output(loss: list[float], counted: list[int], supervised: list[int], correct: list[int]) -> DraftOutput:
    """Position k weighs ``0.5 ** k``."""
    rows = [torch.tensor(row, dtype=torch.float32) for row in (loss, counted, supervised, correct)]
    total = sum(0.5**k * row for k, row in enumerate(loss))
    return DraftOutput(torch.tensor(total), rows[1][0], *rows)


def test_micro_batches_are_weighed_by_their_positions() -> None:
    sums = StepSums(2, torch.device("cpu"))
    sums.add(output([8.0, 6.0], [4, 3], [5, 4], [4, 3]), tokens=20)
    sums.add(output([30.0, 34.0], [16, 17], [20, 16], [6, 7]), tokens=50)
    assert sums.denominator.item() == 20

    report = summarise(sums.flat.tolist(), 2, step=7)

    assert report.loss == pytest.approx((38.0 + 0.5 * 40.0) / 20)
    assert report.loss_per_position == pytest.approx((38 / 20, 40 / 20))
    assert report.accuracy == pytest.approx((10 / 20, 10 / 20))
    assert report.full_accuracy == pytest.approx((10 / 25, 10 / 20))
    assert report.accept_length == pytest.approx(1 + 0.4 + 0.4 * 0.5)
    assert (report.step, report.tokens, report.loss_tokens) == (7, 70, 25)


def test_no_positions_at_all() -> None:
    report = summarise(StepSums(2, torch.device("cpu")).flat.tolist(), 2, step=1)
    assert (report.loss, report.accept_length, report.accuracy) == (0.0, 1.0, (0.0, 0.0))


def test_what_is_not_finite_stays_so() -> None:
    sums = StepSums(1, torch.device("cpu"))
    sums.add(output([float("nan")], [1], [1], [0]), tokens=1)
    assert math.isnan(summarise(sums.flat.tolist(), 1, step=1).loss)
