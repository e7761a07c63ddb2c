"""Which layers a target has."""

from __future__ import annotations

import pytest

from torchspec.target.shape import check_layers, early_middle_late


def test_layers_are_bounds_checked() -> None:
    assert check_layers(30, [0, 28]) == (0, 28)
    for wrong in ([], [29], [-1, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"aux_layers.*from 0 to 28"):
            check_layers(30, wrong)


@pytest.mark.parametrize(
    ("layers", "inputs"), [(30, (2, 15, 27)), (32, (2, 16, 29)), (36, (2, 18, 33)), (7, (2, 3, 4))]
)
def test_default_layers_are_the_outputs_just_before(layers: int, inputs: tuple[int, ...]) -> None:
    assert early_middle_late(layers) == tuple(layer - 1 for layer in inputs)


def test_too_few_layers_have_no_default() -> None:
    with pytest.raises(ValueError, match="aux_layers has no default for a target of 6 layers"):
        early_middle_late(6)
