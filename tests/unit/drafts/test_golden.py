"""Twenty steps of training, loss by loss as they were written down: moving code must not change a digit.

A change of the mathematics changes the file on purpose: ``python -m tests.unit.drafts.test_golden`` writes it anew, and
the commit says why. Plain SGD, because Adam makes a step of what is rounding noise in a vanishing gradient.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.oracles import dflash_cases, eagle3_cases, peagle_cases

FOLDER = Path(__file__).parents[2] / "golden"
STEPS, BATCHES = 20, 4


def losses_of(kind: ModuleType, denominator: Callable[[dict[str, Tensor]], Tensor]) -> list[float]:
    """Loss of each step, in float64, on a few batches in turn.

    Args:
        kind: the module with its random cases.
        denominator: out of a step's sums, by name.
    """
    first = kind.build(kind.Case())
    optimizer = torch.optim.SGD(first.draft.parameters(), lr=0.03)
    batches = [kind.build(kind.Case(seed=100 + number)).batch for number in range(BATCHES)]
    losses = []
    for number in range(STEPS):
        result = kind.run_product(replace(first, batch=batches[number % BATCHES]))
        scale = denominator(result.sums)
        for name, parameter in first.draft.named_parameters():
            parameter.grad = result.gradients[name] / scale
        optimizer.step()
        losses.append((result.total / scale).item())
    return losses


LOSSES = {
    "eagle3": partial(losses_of, eagle3_cases, lambda sums: sums["counted"][0]),
    "dflash": partial(losses_of, dflash_cases, lambda sums: sums["denominator"]),
    "peagle": partial(losses_of, peagle_cases, lambda sums: sums["counted"][0]),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_what_they_were(kind: str) -> None:
    expected = json.loads((FOLDER / f"{kind}.json").read_text())
    assert sum(expected[-BATCHES:]) < 0.9 * sum(expected[:BATCHES])  # it learns, so a wrong gradient shows
    assert LOSSES[kind]() == pytest.approx(expected, rel=1e-12, abs=0)


if __name__ == "__main__":
    for kind, losses in LOSSES.items():
        (FOLDER / f"{kind}.json").write_text(json.dumps(losses(), indent=1) + "\n")
