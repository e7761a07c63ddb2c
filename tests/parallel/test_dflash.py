"""A DFlash step on two data-parallel ranks equals the dense oracle, whatever either of them has to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.oracles.dflash_cases import Case
from tests.parallel import dflash_steps
from tests.parallel.dflash_steps import step_error
from tests.parallel.ranks import Ranks, running_ranks

CASE = Case(lengths=(13, 9, 7, 11), padding=2, num_layers=2)
SHARES = [[0, 2], [1, 3]]
SILENT = {"none": (), "a micro-batch": (2,), "a rank": (1, 3), "all": (0, 1, 2, 3)}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks(2) as group:
        yield group


@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize("sharding", ["replicated", "fsdp2"])
def test_a_step_equals_the_dense_oracle(ranks: Ranks, sharding: str, silent: str) -> None:
    """Also where samples, or all of a rank's, have no anchor: every rank issues the same collectives."""
    assert step_error(ranks, sharding, CASE, SHARES, SILENT[silent]) <= 1e-12


def test_the_blocks_do_not_depend_on_the_rank(ranks: Ranks) -> None:
    """More candidates than anchors, so that the draw matters: other ranks, other micro-batches, the same blocks."""
    case = replace(CASE, lengths=(40, 30, 35, 30), num_anchors=4, mask_rate=1.0)
    for shares in ([[0, 2], [1, 3]], [[3, 1], [0, 2]]):
        assert step_error(ranks, "fsdp2", case, shares) <= 1e-12


def test_gradients_of_each_layer_are_gathered_by_themselves(ranks: Ranks) -> None:
    """FSDP2 gathers a layer while it runs: as many all-gathers more as there are layers."""
    calls = [
        ranks.call(dflash_steps.run_rank, "fsdp2", replace(CASE, num_layers=layers), SHARES, ())[0].calls
        for layers in (1, 3)
    ]
    gathers = [sum("all_gather" in call.op or "allgather" in call.op for call in found) for found in calls]
    assert gathers[1] > gathers[0] > 0 and (gathers[1] - gathers[0]) % 2 == 0
