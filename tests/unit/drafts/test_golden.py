"""Twenty steps of training, loss by loss as they were written down: moving code must not change a digit.

A change of the mathematics changes the file on purpose: ``python -m tests.unit.drafts.test_golden`` writes it anew, and
the commit says why. Plain SGD, because Adam makes a step of what is rounding noise in a vanishing gradient.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.oracles import eagle3_cases

FOLDER = Path(__file__).parents[2] / "golden"
STEPS, BATCHES = 20, 4


def eagle3_losses() -> list[float]:
    """Loss of each step, in float64, on a few batches in turn."""
    first = eagle3_cases.build(eagle3_cases.Case())
    optimizer = torch.optim.SGD(first.draft.parameters(), lr=0.03)
    batches = [eagle3_cases.build(eagle3_cases.Case(seed=100 + number)).batch for number in range(BATCHES)]
    losses = []
    for number in range(STEPS):
        result = eagle3_cases.run_product(replace(first, batch=batches[number % BATCHES]))
        counted = result.sums["counted"][0]
        for name, parameter in first.draft.named_parameters():
            parameter.grad = result.gradients[name] / counted
        optimizer.step()
        losses.append((result.total / counted).item())
    return losses


LOSSES = {"eagle3": eagle3_losses}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_what_they_were(kind: str) -> None:
    expected = json.loads((FOLDER / f"{kind}.json").read_text())
    assert sum(expected[-BATCHES:]) < 0.9 * sum(expected[:BATCHES])  # it learns, so a wrong gradient shows
    assert LOSSES[kind]() == pytest.approx(expected, rel=1e-12, abs=0)


if __name__ == "__main__":
    for kind, losses in LOSSES.items():
        (FOLDER / f"{kind}.json").write_text(json.dumps(losses(), indent=1) + "\n")
