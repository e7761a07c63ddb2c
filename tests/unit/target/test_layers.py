"""Which layers are captured when nobody says, and which must not be said."""

from __future__ import annotations

import pytest

from torchspec.target.layers import default_aux_layers, resolve_aux_layers


@pytest.mark.parametrize(("layers", "inputs"), [(30, (2, 15, 27)), (61, (2, 30, 58)), (7, (2, 3, 4))])
def test_default_aux_layers_are_the_outputs_just_before(layers: int, inputs: tuple[int, ...]) -> None:
    assert default_aux_layers(layers) == tuple(layer - 1 for layer in inputs)


def test_aux_layers_are_bounds_checked() -> None:
    assert resolve_aux_layers(30, [0, 29]) == (0, 29)
    for wrong in ([], [30], [-1, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"aux_layers.*from 0 to 29"):
            resolve_aux_layers(30, wrong)
    for few in (1, 6):
        with pytest.raises(ValueError, match="aux_layers"):
            resolve_aux_layers(few)
    assert len(set(resolve_aux_layers(7))) == 3
