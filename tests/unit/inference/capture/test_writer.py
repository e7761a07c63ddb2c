"""Bad states never reach the store."""

from __future__ import annotations

import torch

from torchspec.inference.capture.writer import find_fault


def test_bad_states_are_found_wherever_they_are() -> None:
    hs, lhs = torch.randn(5, 3 * 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert find_fault(hs, lhs) is None
    for value in (float("nan"), float("inf")):
        bad = hs.clone()
        bad[3, 2 * 8 + 5] = value
        assert find_fault(bad, lhs) == "aux state 2 of token 3 is not finite"
    bad = hs.clone()
    bad[4, 8:16] = 0
    assert find_fault(bad, lhs) == "aux state 1 of token 4 is all zero"
    assert find_fault(hs, torch.zeros(5, 8)) == "last state 0 of token 0 is all zero"
