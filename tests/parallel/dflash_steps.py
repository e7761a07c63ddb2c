"""Whole DFlash training steps on data-parallel ranks, and what the dense oracle says of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.oracles.dflash_cases import Case, Step, build, run_oracle
from tests.oracles.eagle3_cases import Result, worst_error
from tests.parallel.ranks import Ranks
from tests.parallel.recorder import Call, Recorder, first_difference
from torchspec.drafts.draft import Batch, DraftOutput
from torchspec.parallel import mesh
from torchspec.training import learner
from torchspec.training.sums import ROWS, StepSums

CPU = torch.device("cpu")
CLIP = 0.5


class RankOutcome(NamedTuple):
    sums: np.ndarray
    norm: float
    gradients: dict[str, np.ndarray]
    """Summed over ranks, normalised and clipped."""
    calls: list[Call]
    """Collectives of the step, and of an evaluation after it."""


def step_of(case: Case, silent: tuple[int, ...]) -> Step:
    """The case, without a loss token in the ``silent`` samples."""
    step = build(case)
    mask_BS = step.batch.loss_mask_BS.clone()
    mask_BS[list(silent)] = False
    step.batch = replace(step.batch, loss_mask_BS=mask_BS)
    return step


def run_rank(rank: int, sharding: str, case: Case, shares: list[list[int]], silent: tuple[int, ...]) -> RankOutcome:
    """One step on this rank's share of the samples, one a micro-batch, and one evaluation."""
    with Recorder() as recorder:
        step = step_of(case, silent)
        draft = step.draft
        if sharding == "fsdp2":
            mesh.shard_module(draft, draft.units(), CPU)
        batches = [_sample(step.batch, b) for b in shares[rank]]
        sums = StepSums(draft.spec.positions, CPU)

        def forward(batch: Batch) -> DraftOutput:
            return draft(batch, step.target)

        learner.add_gradients(draft, batches, forward, sums, counts_tokens=True)
        norm = learner.reduce_gradients(draft, sums, CLIP)
        gradients = {}
        for name, parameter in draft.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).numpy()
        with torch.no_grad():
            forward(batches[0])
    return RankOutcome(sums.flat.numpy(), norm.item(), gradients, recorder.calls)


def _sample(batch: Batch, b: int) -> Batch:
    names = "hs_BSA", "lhs_BSH", "ids_BS", "loss_mask_BS", "lengths_B", "seeds_B"
    return replace(batch, **{name: getattr(batch, name)[b : b + 1].detach() for name in names})


def step_error(ranks: Ranks, sharding: str, case: Case, shares: list[list[int]], silent: tuple[int, ...] = ()) -> float:
    """Largest relative error of a step against the oracle: loss, sums, norm, gradients; infinite where ranks differ.

    Their collectives are compared, too.
    """
    outcomes = ranks.call(run_rank, sharding, case, shares, silent)
    first = outcomes[0]
    if any(not np.array_equal(o.sums, first.sums) or o.norm != first.norm for o in outcomes):
        return float("inf")
    assert first_difference({rank: outcome.calls for rank, outcome in enumerate(outcomes)}) is None
    oracle = run_oracle(step_of(case, silent))
    scale = 1.0 / (oracle.sums["denominator"].item() or 1.0)
    oracle.gradients.pop("hs")
    norm = scale * sum(g.square().sum().item() for g in oracle.gradients.values()) ** 0.5
    scale *= min(1.0, CLIP / (norm + 1e-6))
    expected = Result(oracle.total, oracle.sums, {name: g * scale for name, g in oracle.gradients.items()})
    loss, counted, supervised, correct = torch.from_numpy(first.sums[:-3]).view(ROWS, -1)
    sums = {"loss": loss, "counted": counted, "supervised": supervised, "correct": correct}
    sums["denominator"] = torch.tensor(first.sums[-2])
    gradients = {name: torch.from_numpy(gradient) for name, gradient in first.gradients.items()}
    norm_error = abs(first.norm - norm) / norm if norm else first.norm
    return max(worst_error(Result(torch.tensor(first.sums[-3]), sums, gradients), expected), norm_error)
