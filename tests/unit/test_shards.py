"""The shard formula: every position has one owner, a halo behind it, and ring ranks hold unbroken runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.shards import Segment, ShardFormula

formulas = st.builds(
    ShardFormula, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["contiguous", "zigzag"]), st.integers(1, 9)
)
lengths = st.one_of(st.integers(1, 12), st.integers(1, 3000))


def test_contiguous_by_hand() -> None:
    formula = ShardFormula(2, 2, "contiguous", halo=3)
    shards = [formula.segments(10, rank) for rank in range(4)]
    assert shards == [(Segment(0, 3, 6),), (Segment(3, 6, 9),), (Segment(6, 9, 10),), (Segment(9, 10, 10),)]


def test_zigzag_by_hand() -> None:
    formula = ShardFormula(1, 2, "zigzag", halo=2)
    assert formula.segments(9, 0) == (Segment(0, 3, 5), Segment(9, 9, 9))
    assert formula.segments(9, 1) == (Segment(3, 6, 8), Segment(6, 9, 9))


def test_fewer_tokens_than_ranks() -> None:
    formula = ShardFormula(2, 2, "contiguous", halo=2)
    assert [formula.segments(2, rank)[0] for rank in range(4)] == [(0, 1, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(formula=formulas, num_tokens=lengths)
def test_every_position_has_one_owner_and_a_whole_halo(formula: ShardFormula, num_tokens: int) -> None:
    segments = sorted(s for rank in range(formula.size) for s in formula.segments(num_tokens, rank))
    owned = [s for s in segments if s.start < s.stop]
    assert [owned[0].start, owned[-1].stop] == [0, num_tokens]
    assert all(a.stop == b.start for a, b in pairwise(owned))
    for start, stop, halo_stop in segments:
        assert stop - start <= formula.chunk(num_tokens)
        # the last row, stop - 1, reads and is compared with the positions up to stop - 1 + halo
        assert halo_stop == (min(stop + formula.halo, num_tokens) if start < stop else stop)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(formula=formulas, num_tokens=lengths)
def test_members_of_a_ring_rank_hold_a_run_together(formula: ShardFormula, num_tokens: int) -> None:
    for ring_rank in range(formula.ring_size):
        members = range(ring_rank * formula.ulysses_size, (ring_rank + 1) * formula.ulysses_size)
        for part in range(formula.parts):
            owned = sorted(p for r in members for p in range(*formula.segments(num_tokens, r)[part][:2]))
            start, stop = formula.ring_segment(num_tokens, ring_rank, part)
            assert owned == list(range(start, stop))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(formula=formulas, batch=st.lists(lengths, min_size=1, max_size=4))
def test_windows_fit_into_one_shape_for_all_ranks(formula: ShardFormula, batch: list[int]) -> None:
    rows, columns = formula.window_shape(batch)
    for rank in range(formula.size):
        windows = list(formula.windows(batch, rank))
        assert len(windows) == rows
        assert all(s.halo_stop - s.start <= columns for _, s in windows)
        for sample, num_tokens in enumerate(batch):
            mine = [s for b, s in windows if b == sample]
            assert mine == list(formula.segments(num_tokens, rank))


@pytest.mark.parametrize("ring_size", [2, 4, 8])
def test_zigzag_balances_a_causal_ring(ring_size: int) -> None:
    """Pairs of query and earlier key per ring rank, max over mean: nearly 2 for contiguous, 1 for zigzag."""

    def balance(layout: str) -> float:
        formula = ShardFormula(2, ring_size, layout, halo=7)  # type: ignore[arg-type]
        work = []
        for ring_rank in range(ring_size):
            runs = [formula.ring_segment(4096, ring_rank, part) for part in range(formula.parts)]
            work.append(sum(p + 1 for start, stop in runs for p in range(start, stop)))
        return max(work) * ring_size / sum(work)

    assert balance("zigzag") < 1.001
    assert balance("contiguous") > 2 - 1.01 / ring_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "zigzag", 7), "ulysses_size=0"),
        ((1, -2, "zigzag", 7), "ring_size=-2"),
        ((1, 1, "zigzag", 0), "halo=0"),
        ((1, 1, "striped", 7), "layout='striped' must be one of contiguous, zigzag"),
    ],
)
def test_impossible_formulas_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardFormula(*arguments)
