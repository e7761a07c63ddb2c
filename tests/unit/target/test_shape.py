"""Which layers a target has."""

from __future__ import annotations

import pytest

from torchspec.target.shape import check_layers


def test_layers_are_bounds_checked() -> None:
    assert check_layers(30, [0, 29]) == (0, 29)
    for wrong in ([], [30], [-1, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"aux_layers.*from 0 to 29"):
            check_layers(30, wrong)
