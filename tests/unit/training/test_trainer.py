"""The step loop of a rank, without ranks."""

from __future__ import annotations

import pytest

from torchspec.contracts import RankBatch
from torchspec.training.fetch import FetchedStep
from torchspec.training.trainer import Trainer


def test_a_rank_refuses_a_step_that_its_weights_do_not_come_before() -> None:
    """Its checkpoint and the ledger's may differ where a file system shows each machine something else."""
    rank = object.__new__(Trainer)
    rank.step = 2
    for step in (2, 4):
        with pytest.raises(
            RuntimeError, match=f"step {step} does not follow step 2, which the weights of this rank are of"
        ):
            rank._train(FetchedStep(RankBatch(step, ()), [], 0.0), 0.0)
    assert rank.step == 2
