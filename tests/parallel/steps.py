"""Whole EAGLE3 training steps on several ranks: each rank's part, and what the dense oracle says of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.oracles.eagle3_cases import Case, Result, Step, build, run_oracle, worst_error
from tests.parallel.mutations import mutated
from tests.parallel.ranks import Ranks
from tests.parallel.recorder import Call, Recorder, first_difference
from torchspec.drafts.draft import Batch, DraftOptions, DraftOutput
from torchspec.parallel import mesh
from torchspec.parallel.mesh import Sharing
from torchspec.parallel.usp import UspBackend
from torchspec.shards import Layout, ShardFormula
from torchspec.training import learner as training
from torchspec.training.sums import ROWS, StepSums

CPU = torch.device("cpu")
GARBAGE = 1e3
"""What padding holds: finite, and large enough to be noticed."""


@dataclass(frozen=True)
class Setup:
    """How a step is split over ranks."""

    ulysses: int
    ring: int
    layout: Layout = "contiguous"
    gather_once: bool = True
    sharding: str = "replicated"
    micro_batches: int = 1
    clip: float = 0.5
    activation_checkpointing: bool = False
    autocast: bool = False
    """Compute in bfloat16."""
    mutation: str | None = None

    def __str__(self) -> str:
        way = "gathered" if self.gather_once else "circulating"
        return f"U{self.ulysses}R{self.ring}-{self.layout}-{way}-{self.sharding}"

    @property
    def sp_size(self) -> int:
        return self.ulysses * self.ring

    def formula(self, ttt_length: int) -> ShardFormula:
        return ShardFormula(self.ulysses, self.ring, self.layout, ttt_length)

    def shares(self, samples: int, world: int) -> list[list[list[int]]]:
        """Sample numbers of each micro-batch of each data-parallel replica; some may be empty."""
        replicas = world // self.sp_size
        return [
            [
                list(range(dp * self.micro_batches + m, samples, replicas * self.micro_batches))
                for m in range(self.micro_batches)
            ]
            for dp in range(replicas)
        ]


@dataclass
class RankOutcome:
    """What one rank knows after a step. Parameter gradients come from rank 0 alone."""

    sums: np.ndarray
    norm: float
    gradients: dict[str, np.ndarray]
    hs_gradients: list[np.ndarray]
    """Of each micro-batch, in windows."""
    calls: list[Call]
    """Collectives of the step, and of an evaluation after it."""


@cache
def mesh_of(ulysses: int, ring: int) -> DeviceMesh:
    return mesh.build_mesh(CPU, ulysses, ring)


def masks(case: Case, setup: Setup, count: int) -> list[Tensor]:
    """Adversarial masks first: nothing, everything, a single token, one rank's tokens, all but one rank's."""
    shape = len(case.lengths), max(case.lengths)
    valid_BS = torch.arange(shape[1]) < torch.tensor(case.lengths).unsqueeze(1)
    owner_BS = torch.full(shape, -1)
    formula = setup.formula(case.ttt_length)
    for rank in range(setup.sp_size):
        for sample, (start, stop, _) in formula.windows(case.lengths, rank):
            owner_BS[sample, start:stop] = rank
    found = [torch.zeros(shape, dtype=torch.bool), valid_BS]
    for rank in range(setup.sp_size):
        found += [owner_BS == rank, valid_BS & (owner_BS != rank)]
    for flat in valid_BS.flatten().nonzero().squeeze(1):
        single = torch.zeros(shape, dtype=torch.bool)
        single.view(-1)[flat] = True
        found.append(single)
    generator = torch.Generator().manual_seed(sum(case.lengths))
    while len(found) < count:
        rate_B1 = torch.rand(shape[0], 1, generator=generator) ** 2
        found.append((torch.rand(shape, generator=generator) < rate_B1) & valid_BS)
    return found[:count]


def windows_of(batch: Batch, samples: Sequence[int], formula: ShardFormula, rank: int) -> Batch:
    """What a rank holds of some samples of a batch; one sample of nothing where there are none."""
    if not samples:
        empty = Batch(
            hs_BSA=torch.full_like(batch.hs_BSA[:1], GARBAGE),
            lhs_BSH=batch.lhs_BSH[:1],
            ids_BS=batch.ids_BS[:1],
            loss_mask_BS=torch.zeros_like(batch.loss_mask_BS[:1]),
            lengths_B=torch.zeros_like(batch.lengths_B[:1]) + 1,
            seeds_B=batch.seeds_B[:1],
        )
        return windows_of(empty, [0], formula, rank)
    lengths_B = batch.lengths_B[samples]
    lengths = lengths_B.tolist()
    shape = formula.window_shape(lengths)
    hs, lhs = (x.new_full((*shape, x.shape[2]), GARBAGE) for x in (batch.hs_BSA, batch.lhs_BSH))
    ids = batch.ids_BS.new_zeros(shape)
    for row, (b, (start, stop, halo_stop)) in enumerate(formula.windows(lengths, rank)):
        sample = samples[b]
        hs[row, : stop - start] = batch.hs_BSA[sample, start:stop].detach()
        lhs[row, : halo_stop - start] = batch.lhs_BSH[sample, start:halo_stop]
        ids[row, : halo_stop - start] = batch.ids_BS[sample, start:halo_stop]
    return Batch(
        hs.requires_grad_(), lhs, ids, batch.loss_mask_BS[samples], lengths_B, batch.seeds_B[samples], batch.norm_state
    )


def run_rank(rank: int, setup: Setup, case: Case, mask: Tensor | None = None) -> RankOutcome:
    """One step and one evaluation, as a trainer's rank takes them."""
    with mutated(setup.mutation), Recorder() as recorder:
        step = build_step(case, mask)
        draft, formula = step.draft, setup.formula(case.ttt_length)
        draft.options = DraftOptions(case.chunk, setup.activation_checkpointing)
        sharing = Sharing(formula, mesh_of(setup.ulysses, setup.ring), setup.gather_once)
        draft.plan = UspBackend(sharing, draft.spec.target).plan
        if setup.sharding == "fsdp2":
            mesh.shard_module(draft, draft.units(), CPU)
        share = setup.shares(len(case.lengths), dist.get_world_size())[rank // setup.sp_size]
        batches = [windows_of(step.batch, samples, formula, rank % setup.sp_size) for samples in share]
        sums = StepSums(case.ttt_length, CPU)

        def forward(batch: Batch) -> DraftOutput:
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
                return draft(batch, step.target)

        training.add_gradients(draft, batches, forward, sums, counts_tokens=rank % setup.sp_size == 0)
        norm = training.reduce_gradients(draft, sums, setup.clip)
        gradients = {name: _whole(parameter.grad) for name, parameter in draft.named_parameters()}
        with torch.no_grad():
            forward(batches[0])
    hs_gradients = [_whole(batch.hs_BSA.grad) for batch in batches]
    return RankOutcome(sums.flat.numpy(), norm.item(), gradients if rank == 0 else {}, hs_gradients, recorder.calls)


def _whole(gradient: Tensor | None) -> np.ndarray:
    """Nothing where there is no gradient, which equals no gradient."""
    if gradient is None:
        return np.empty(0)
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).numpy()


def build_step(case: Case, mask: Tensor | None) -> Step:
    """The case, with another loss mask where one is given."""
    step = build(case)
    if mask is not None:
        step.batch = replace(step.batch, loss_mask_BS=mask)
    return step


def gathered(outcomes: list[RankOutcome], setup: Setup, case: Case) -> Result:
    """The ranks' outcomes put together. Gradients of parameters are normalised and clipped, that of hs is not."""
    sums = outcomes[0].sums
    loss, counted, supervised, correct = torch.from_numpy(sums[: ROWS * case.ttt_length]).view(ROWS, -1)
    gradients = {name: torch.from_numpy(gradient) for name, gradient in outcomes[0].gradients.items()}
    gradients["hs"] = _hs_gradient(outcomes, setup, case)
    return Result(
        torch.tensor(sums[-3]),
        {"loss": loss, "counted": counted, "supervised": supervised, "correct": correct},
        gradients,
    )


def step_error(ranks: Ranks, setup: Setup, case: Case, mask: Tensor | None = None) -> float:
    """Largest relative error of a step against the oracle: loss, sums, norm, gradients. Collectives are compared too.

    Infinite where the ranks do not agree.
    """
    outcomes = ranks.call(run_rank, setup, case, mask)
    first = outcomes[0]
    if any(not np.array_equal(o.sums, first.sums) or o.norm != first.norm for o in outcomes):
        return float("inf")
    assert first.sums[-1] == expected_tokens(outcomes, setup, case)
    assert first_difference({rank: outcome.calls for rank, outcome in enumerate(outcomes)}) is None
    oracle, norm = expected(setup, case, mask)
    norm_error = abs(first.norm - norm) / norm if norm else first.norm
    return max(worst_error(gathered(outcomes, setup, case), oracle), norm_error)


def expected_tokens(outcomes: list[RankOutcome], setup: Setup, case: Case) -> int:
    """Every sample's tokens once, and one token for each idle micro-batch."""
    shares = setup.shares(len(case.lengths), len(outcomes))
    return sum(case.lengths) + sum(not samples for share in shares for samples in share)


def _hs_gradient(outcomes: list[RankOutcome], setup: Setup, case: Case) -> Tensor:
    whole = torch.zeros(len(case.lengths), max(case.lengths) + case.padding, 3 * case.hidden, dtype=case.dtype)
    formula = setup.formula(case.ttt_length)
    shares = setup.shares(len(case.lengths), len(outcomes))
    for rank, outcome in enumerate(outcomes):
        share = shares[rank // setup.sp_size]
        for samples, gradient in zip(share, outcome.hs_gradients, strict=True):
            windows = torch.from_numpy(gradient)
            lengths = [case.lengths[b] for b in samples]
            for row, (b, (start, stop, _)) in enumerate(formula.windows(lengths, rank % setup.sp_size)):
                whole[samples[b], start:stop] = windows[row, : stop - start]
                windows[row, : stop - start] = 0
            if windows.any():  # outside of the owned rows: nobody may add to that
                whole.fill_(torch.nan)
    return whole


def expected(setup: Setup, case: Case, mask: Tensor | None = None) -> tuple[Result, float]:
    """What the oracle says of the whole step, in float64, and the norm before clipping."""
    step = build_step(case, mask)
    step.draft.double()
    target, batch = step.target, step.batch
    step.target = replace(target, embedding_VH=target.embedding_VH.double())
    step.target_head_VH = step.target_head_VH.double()
    hs = batch.hs_BSA.detach().double().requires_grad_()
    step.batch = replace(batch, hs_BSA=hs, lhs_BSH=batch.lhs_BSH.double())
    result = run_oracle(step)
    scale = 1.0 / max(result.sums["counted"][0].item(), 1.0)
    hs_gradient = result.gradients.pop("hs")
    norm = scale * sum(g.square().sum().item() for g in result.gradients.values()) ** 0.5
    scale *= min(1.0, setup.clip / (norm + 1e-6))
    gradients = {name: gradient * scale for name, gradient in result.gradients.items()}
    return Result(result.total, result.sums, {**gradients, "hs": hs_gradient}), norm
