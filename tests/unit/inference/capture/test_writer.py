"""Bad states never reach the store."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from torchspec.inference.capture.writer import CaptureWriter, find_fault
from torchspec.store.errors import StoreError, StoreFull, StoreUnavailable


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [(StoreFull("full"), "no_room"), (StoreUnavailable("away"), "no_store"), (StoreError("odd"), "retry")],
)
def test_what_a_failed_put_calls_for(error: StoreError, kind: str) -> None:
    outcome: Future[int] = Future()
    outcome.set_exception(error)
    views = {"hs": torch.ones(2, 8), "lhs": torch.ones(2, 8), "ids": torch.zeros(2, dtype=torch.int32)}
    writer = CaptureWriter.__new__(CaptureWriter)
    writer.store = SimpleNamespace(put=lambda key, buffer, sharding: outcome)
    message = writer._write("k", SimpleNamespace(views=views), [1, 2], None)
    assert message == {"stored": False, "key": "k", "reason": str(error), "kind": kind}
