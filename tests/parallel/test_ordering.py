"""Whatever the loss masks hold, all ranks of a group issue the same collectives in the same order.

Once over real groups, where a difference would hang, and once with torch's fake process group, which does nothing:
there a rank that skips a collective finishes, and must be caught by the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.oracles.eagle3_cases import Case
from tests.parallel.mutations import SKIPS
from tests.parallel.ranks import Ranks, running_ranks
from tests.parallel.recorder import Call, first_difference
from tests.parallel.steps import Setup, masks, mesh_of, run_rank
from torchspec.nn.chain_rows import active_rows

SMALL = Case(
    ttt_length=2, lengths=(11, 6), padding=0, kv_heads=2, group=2, head_dim=4, hidden=8, vocab=20, draft_vocab=12
)
CASES = (SMALL, replace(SMALL, lengths=(3,)), replace(SMALL, lengths=(1, 9)), replace(SMALL, lengths=(2, 1, 1)))


def record(rank: int, setup: Setup, case: Case, masks: list[Tensor]) -> list[list[Call]]:
    return [run_rank(rank, setup, case, mask).calls for mask in masks]


def differences(recorded: list[list[list[Call]]]) -> list[str]:
    """Over the masks, from each rank's record."""
    found = (first_difference(dict(enumerate(calls))) for calls in zip(*recorded, strict=True))
    return [difference for difference in found if difference]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks(4) as group:
        yield group


REAL = [
    Setup(2, 2, "zigzag", gather_once=True, sharding="fsdp2"),
    Setup(2, 2, "contiguous", gather_once=False),
    Setup(4, 1, "contiguous", activation_checkpointing=True),
    Setup(1, 4, "zigzag", gather_once=False, sharding="fsdp2"),
    Setup(2, 1, "contiguous", micro_batches=2, sharding="fsdp2"),
]


@pytest.mark.parametrize("setup", REAL, ids=str)
def test_real_groups_never_differ_and_never_hang(ranks: Ranks, setup: Setup) -> None:
    for case, count in zip(CASES, (20, 3, 3, 3), strict=True):
        case = replace(case, group=setup.ulysses)
        recorded = ranks.call(record, setup, case, masks(case, setup, count))
        assert not differences(recorded)
        assert {call.op for call in recorded[0][0]} & {"alltoall_base_", "send", "_allgather_base_"}


def record_faked(world: int, setup: Setup, case: Case, masks: list[Tensor]) -> list[list[list[Call]]]:
    """Like :func:`record` on every rank, one after the other in this process. Collectives leave garbage behind."""
    recorded = []
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            recorded.append(record(rank, setup, case, masks))
        finally:
            mesh_of.cache_clear()
            dist.destroy_process_group()
    return recorded


FAKED = [
    (8, Setup(2, 4, "zigzag", gather_once=False)),
    (8, Setup(4, 2, "contiguous")),
    (8, Setup(8, 1, "zigzag")),
    (4, Setup(2, 1, "zigzag", micro_batches=2)),
    (6, Setup(3, 2, "contiguous", gather_once=False)),
]


@pytest.mark.parametrize(("world", "setup"), FAKED, ids=str)
def test_hundreds_of_masks_never_make_a_difference(world: int, setup: Setup) -> None:
    for case, count in zip(CASES, (24, 4, 6, 4), strict=True):
        case = replace(case, group=3 * 4)
        assert not differences(record_faked(world, setup, case, masks(case, setup, count)))


@pytest.mark.parametrize("fault", SKIPS)
def test_a_rank_that_skips_is_caught(fault: str) -> None:
    setup = Setup(2, 2, gather_once=False, mutation=fault)
    assert differences(record_faked(4, setup, SMALL, masks(SMALL, setup, 12)))


def test_the_recorder_names_who_differs_and_where() -> None:
    call, other = (
        Call("allreduce_", (0, 1), (((3,), "torch.float32"),)),
        Call("allreduce_", (0, 1), (((4,), "torch.float32"),)),
    )
    assert first_difference({0: [call, other], 1: [call, other]}) is None
    for wrong in ([call], [call, call], [other, call], [call, other, call]):
        assert "rank 1" in (first_difference({0: [call, other], 1: wrong}) or "")
    ring, pair = Call("send", (0, 2), ()), Call("send", (0, 1), ())
    assert first_difference({0: [pair, ring], 1: [pair], 2: [ring]}) is not None


def test_the_masks_leave_some_ranks_without_anything() -> None:
    """For some a rank, for some all ranks have no row to compute, and for others all have."""
    setup = Setup(2, 2)
    lengths, formula = list(SMALL.lengths), setup.formula(SMALL.ttt_length)
    idle = set()
    for mask_BS in masks(SMALL, setup, 30):
        active_BS = active_rows(mask_BS, SMALL.ttt_length)
        rows = [
            sum(int(active_BS[b, start:stop].sum()) for b, (start, stop, _) in formula.windows(lengths, rank))
            for rank in range(setup.sp_size)
        ]
        idle.add(rows.count(0))
    assert idle >= {0, 1, 2, 3, 4}
