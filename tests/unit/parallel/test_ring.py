"""Tiles, merging and head counts of sequence-parallel attention, without any ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.nn.flash import block_attention, merge_
from torchspec.parallel.ring import Run, tiles
from torchspec.shards import ShardFormula, key_value_repeats


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    length=st.integers(1, 40),
    ring_size=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    data=st.data(),
)
def test_tiles_are_each_causal_pair_once(length: int, ring_size: int, layout: str, data: st.DataObject) -> None:
    """Over all blocks of keys, also for queries that begin or end inside of their run."""
    formula = ShardFormula(2, ring_size, layout, halo=1)  # type: ignore[arg-type]
    segments = [formula.ring_segment(length, r, part) for r in range(ring_size) for part in range(formula.parts)]
    keys = [Run(1, start, stop, start + 100) for start, stop in segments]
    start, stop = data.draw(st.sampled_from([s for s in segments if s[0] < s[1]]))
    first = data.draw(st.integers(start, stop - 1))
    query = Run(1, first, data.draw(st.integers(first + 1, stop)), 7)
    pairs = []
    for tile in tiles([query], [*keys, Run(0, 0, length, 500)]):  # another sample's keys are never met
        for i, q in enumerate(range(tile.queries.start, tile.queries.stop)):
            pairs += [
                (q - 7 + first, k - 100)
                for j, k in enumerate(range(tile.keys.start, tile.keys.stop))
                if j <= i or not tile.causal
            ]
        assert not tile.causal or tile.queries.stop - tile.queries.start == tile.keys.stop - tile.keys.start
    assert sorted(pairs) == [(q, k) for q in range(query.start, query.stop) for k in range(q + 1)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_merged_parts_are_the_whole_softmax(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator, dtype=torch.float64) for n in (5, 12, 12))
    q *= scale * 8**0.5
    expected_o, expected_lse = block_attention(q, k, v, causal=False)
    o, lse = torch.zeros(5, 2, 8, dtype=torch.float64), torch.full((5, 2), -torch.inf, dtype=torch.float64)
    for keys in (slice(3, 7), slice(0, 3), slice(7, 12)):
        part_o, part_lse = block_attention(q, k[:, keys], v[:, keys], causal=False)
        merge_(o, lse, part_o[0], part_lse[0])
    torch.testing.assert_close(o, expected_o[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses", "repeats"), [(8, 8, 4, 1), (8, 2, 4, 2), (6, 3, 2, 2), (8, 1, 8, 8), (9, 3, 3, 1)]
)
def test_key_value_heads_are_repeated_as_needed(heads: int, kv_heads: int, ulysses: int, repeats: int) -> None:
    assert key_value_repeats(heads, kv_heads, ulysses) == repeats


def test_query_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sp_ulysses_size=2 does not divide the draft's 9 query heads: .* 1, 3, 9"):
        key_value_repeats(9, 3, 2)
