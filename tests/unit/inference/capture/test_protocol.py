"""Ids of requests: what they say, and that none is the beginning of another."""

from __future__ import annotations

from torchspec.inference.capture.protocol import capture_rid, captured_key, captured_sharding
from torchspec.shards import ShardFormula


def test_no_capture_request_id_is_another_ones_prefix() -> None:
    assert captured_key(capture_rid("e0p1a0")) == "e0p1a0"
    assert captured_sharding(capture_rid("e0p1a0")) is None
    formula = ShardFormula(3, 2, "zigzag", 7)
    split = capture_rid("run/1/e0p1a0", formula)
    assert (captured_key(split), captured_sharding(split)) == ("run/1/e0p1a0", formula)
    assert split.endswith(":") and not split.startswith(capture_rid("run/1/e0p1a", formula))
    assert not capture_rid("e0p10").startswith(capture_rid("e0p1"))


def test_only_whole_capture_ids_name_a_key() -> None:
    for rid in ("answer:a:", "e0p1a0", "capture:e0p1a0", "capture::", "capture:a:b:", "capture:a:2x1-zigzag-7"):
        assert captured_key(rid) is None
