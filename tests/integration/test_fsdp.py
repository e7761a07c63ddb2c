"""Any number of data-parallel ranks trains the same draft: FSDP2 over gloo, one process a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.integration.trainer_harness import Bench, Outcome, Step, make_config, put_samples, run_script

RELATIVE = 1e-5


def assert_same_training(actual: Outcome, expected: Outcome) -> None:
    assert actual.errors == expected.errors == []
    for a, b in zip(actual.reports, expected.reports, strict=True):
        for name in ("loss", "grad_norm", "accept_length", "loss_per_position", "accuracy", "full_accuracy"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=RELATIVE), (a.step, name)
        assert (a.tokens, a.loss_tokens, a.learning_rate) == (b.tokens, b.loss_tokens, b.learning_rate)
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in actual.weights.items():
        assert relative_difference(weight, expected.weights[name]) < RELATIVE, name


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.slow
def test_1_2_and_3_ranks_train_the_same_draft(bench: Bench, tmp_path: Path) -> None:
    silent = put_samples(bench.client, [9, 12], prefix="silent", first=40, unsupervised=[40, 41])
    full = put_samples(bench.client, [31, 8, 12, 20, 9, 14], prefix="full")
    lopsided = put_samples(bench.client, [25, 10, 11], prefix="lopsided", first=20, unsupervised=[20])
    tail = put_samples(bench.client, [17], prefix="tail", first=30)
    heldout = put_samples(bench.client, [12, 30, 7, 9], prefix="heldout", first=50)
    steps = [
        Step(silent),  # nobody has a loss token
        Step(full),  # two micro-batches with one rank, one with three
        Step(lopsided),  # with 3 ranks, the first has no loss token
        Step(tail, evaluate=True),  # with 2 and 3 ranks, one rank has a sample and the others none
        Step(full[::-1]),
    ]
    # AdamW's division by sqrt(v) makes much of rounding where a gradient is next to nothing; a larger eps does not
    config = make_config(bench.target, tmp_path / "run", evaluation={"heldout": "unused"}, optimizer={"eps": 1e-4})

    one = run_script(config, bench.endpoint, steps, heldout=heldout)

    assert (one.reports[0].loss, one.reports[0].grad_norm, one.reports[0].loss_tokens) == (0.0, 0.0, 0)
    assert max(relative_difference(w, one.start[name]) for name, w in one.weights.items()) > 0.01
    for world in (2, 3):
        assert_same_training(run_script(config, bench.endpoint, steps, world=world, heldout=heldout), one)
    config.training.sharding = "replicated"
    assert_same_training(run_script(config, bench.endpoint, steps, world=3, heldout=heldout), one)
