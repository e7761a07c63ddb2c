"""The whole EAGLE3 step on 2, 4 and 8 ranks equals one rank's dense oracle: loss, sums, norm, every gradient.

Real gloo groups, met once per size. Every split of the ranks, layout, way of the keys and sharding of the weights gets
cases of its own, drawn by hypothesis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.oracles.eagle3_cases import Case, run_oracle
from tests.parallel.mutations import MISTAKES
from tests.parallel.ranks import Ranks, running_ranks
from tests.parallel.steps import CPU, Setup, build_step, expected, gathered, masks, run_rank, step_error
from torchspec.parallel.mesh import build_mesh

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    ttt_length=st.integers(1, 5),
    lengths=st.tuples(st.integers(8, 24), *[st.integers(1, 24)] * 3).flatmap(
        lambda lengths: st.integers(1, 4).map(lambda count: lengths[:count])
    ),
    padding=st.integers(0, 2),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    draft_vocab=st.integers(10, 40),
    mask_rate=st.sampled_from([0.1, 0.6, 0.6, 1.0]),
    chunk=st.integers(1, 90),
)


def drawn(count: int) -> list[Case]:
    """Cases by hypothesis, the simple ones that it starts with left out."""
    found: list[Case] = []

    @settings(max_examples=2 * count, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(cases)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    assert len(found) >= count
    return found[-count:]


def setups(world: int, sp_size: int, **options: int | float) -> list[Setup]:
    """Every way to share samples among ``sp_size`` of ``world`` ranks."""
    found = []
    for ulysses in (u for u in (1, 2, 4, 8) if sp_size % u == 0):
        ways = (True, False) if sp_size > ulysses else (True,)  # a ring of one has nothing to circulate
        for layout, way, sharding in product(("contiguous", "zigzag"), ways, ("replicated", "fsdp2")):
            found.append(Setup(ulysses, sp_size // ulysses, layout, way, sharding, **options))
    return found


def fitted(case: Case, setup: Setup) -> Case:
    """The case with query heads that the Ulysses ranks can split; key/value heads are as drawn, often fewer."""
    return replace(case, group=case.group * setup.ulysses // math.gcd(case.kv_heads, setup.ulysses))


SPLITS = [
    *((2, setup) for setup in 2 * setups(2, 2, micro_batches=2)),
    *((4, setup) for setup in setups(4, 4)),
    *((8, setup) for setup in setups(8, 8, clip=1e9)),
    *((4, setup) for setup in setups(4, 2, micro_batches=2)),
    *((8, setup) for setup in setups(8, 4)[::5]),
]
RUNS = [(world, setup, fitted(case, setup)) for (world, setup), case in zip(SPLITS, drawn(len(SPLITS)), strict=True)]


@pytest.fixture(scope="module", params=[2, 4, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with running_ranks(request.param) as group:
        yield group


@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        pytest.param(torch.float64, 1, id="fp64"),
        pytest.param(torch.float32, 5, id="fp32"),
        pytest.param(torch.float32, 1, id="fp32-all", marks=pytest.mark.slow),
    ],
)
def test_a_step_equals_the_dense_oracle(ranks: Ranks, dtype: torch.dtype, every: int) -> None:
    """The mathematics is the same in both dtypes, so every fifth run shows that float32 is not computed otherwise."""
    errors = {
        (setup, case): step_error(ranks, setup, replace(case, dtype=dtype))
        for world, setup, case in RUNS[::every]
        if world == ranks.size
    }
    wrong = {run: error for run, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong
    assert len({(setup.ulysses, setup.ring) for setup, _ in errors}) >= 2


def test_the_cases_are_not_trivial() -> None:
    """Most steps have counted and uncounted positions, and a gradient in every parameter: zeros cannot pass."""
    full = 0
    for _, _, case in RUNS:
        result = run_oracle(build_step(case, None))
        supervised, counted = (result.sums[name].sum() for name in ("supervised", "counted"))
        full += bool(supervised > counted > 0 and all(g.abs().max() > 1e-4 for g in result.gradients.values()))
    assert full > 0.6 * len(RUNS)


@pytest.mark.parametrize("lengths", [(3,), (1,), (2, 1, 9)], ids=str)
def test_fewer_tokens_than_ranks(ranks: Ranks, lengths: tuple[int, ...]) -> None:
    for setup in (Setup(ranks.size, 1, "zigzag"), Setup(1, ranks.size, gather_once=False), Setup(2, ranks.size // 2)):
        case = fitted(Case(lengths=lengths, padding=0, mask_rate=1.0), setup)
        assert step_error(ranks, setup, case) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("setup", [Setup(2, 2, "zigzag", gather_once=False), Setup(2, 2, sharding="fsdp2")], ids=str)
def test_masks_that_leave_ranks_without_loss(ranks: Ranks, setup: Setup) -> None:
    """No token, all tokens, those of one rank, all but those: the gradients are those of the tokens there are."""
    case = Case(lengths=(13, 9), padding=0)
    for mask in masks(case, setup, 2 + 2 * setup.sp_size):
        assert step_error(ranks, setup, case, mask) <= TOLERANCE[torch.float64]


def test_norms_change_nothing(ranks: Ranks) -> None:
    """They are of rows, and rows are never split."""
    for setup in (Setup(2, ranks.size // 2, "zigzag", sharding="fsdp2"), Setup(1, ranks.size, gather_once=False)):
        for norms in ({"fc_norm": True}, {"norm_before_fc": True}):
            assert step_error(ranks, setup, fitted(Case(norm_output=True, **norms), setup)) <= TOLERANCE[torch.float64]


def test_activation_checkpointing_changes_nothing(ranks: Ranks) -> None:
    for setup in (Setup(ranks.size, 1), Setup(1, ranks.size, "zigzag"), Setup(1, ranks.size, gather_once=False)):
        setup = replace(setup, activation_checkpointing=True)
        assert step_error(ranks, setup, fitted(Case(), setup)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("gather_once", [True, False])
def test_in_bf16_gradients_of_keys_cross_the_ring_in_fp32(ranks: Ranks, gather_once: bool) -> None:
    """Gathered: once there and once back, whatever the number of steps. Circulating: in each step, and each way."""
    setup = Setup(2, 2, gather_once=gather_once, autocast=True, clip=1e9)
    case = Case(dtype=torch.float32, lengths=(60, 41), hidden=48)
    outcomes = ranks.call(run_rank, setup, case)
    oracle, _ = expected(setup, case)
    for name, gradient in gathered(outcomes, setup, case).gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten().double(), oracle.gradients[name].flatten(), dim=0)
        assert cosine > 0.98, name
    ring = Counter((call.op, call.tensors[0][1]) for call in outcomes[0].calls if call.group == (0, 2))
    steps = case.ttt_length
    if gather_once:  # in training and in the evaluation after it
        assert ring == {("_allgather_base_", "torch.bfloat16"): 2, ("_reduce_scatter_base_", "torch.float32"): 1}
    else:  # forward, backward and evaluation; gradients need a step more to come home
        del ring["recv_", "torch.bfloat16"], ring["recv_", "torch.float32"]
        assert ring == {("send", "torch.bfloat16"): 3 * steps, ("send", "torch.float32"): 2 * steps}


def refuse_mesh(rank: int) -> None:
    message = "sp_ulysses_size=3 times training.sp_ring_size=1 is 3, which does not divide the 4 training ranks"
    with pytest.raises(ValueError, match=message):
        build_mesh(CPU, 3, 1)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_sizes_that_do_not_divide_the_ranks_are_refused(ranks: Ranks) -> None:
    ranks.call(refuse_mesh)


USUAL = Setup(2, 2)
WHERE_IT_SHOWS = {
    "ring order reversed": Setup(1, 4, gather_once=False),
    "other ranks' gradients lost (circulating)": Setup(2, 2, gather_once=False),
    "gradients stay one rank off": Setup(2, 2, gather_once=False),
    "mean over ranks (FSDP2)": Setup(2, 2, sharding="fsdp2"),
    "norm of one shard (FSDP2)": Setup(2, 2, sharding="fsdp2"),
}


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_mistakes_are_noticed(ranks: Ranks) -> None:
    """Each mistake, written into the product's own source, breaks the comparison."""
    assert all(step_error(ranks, setup, Case()) <= 1e-12 for setup in {USUAL, *WHERE_IT_SHOWS.values()})
    mutants = {name: replace(WHERE_IT_SHOWS.get(name, USUAL), mutation=name) for name in MISTAKES}
    errors = {name: step_error(ranks, setup, Case()) for name, setup in mutants.items()}
    assert not {name: error for name, error in errors.items() if error <= 1e-4}
