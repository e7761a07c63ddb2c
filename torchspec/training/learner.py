"""One draft in training: module, optimizer, and its step from top to bottom.

    forward and backward of each micro-batch -> sum over ranks -> scale and clip -> is it finite? -> set the rate, step

Each rank adds up the gradients of its micro-batches, un-normalised. The gradients and the sums (``StepSums``) are then
summed over all ranks, sequence-parallel and data-parallel ones alike, and divided once by the global denominator. The
collectives and their order depend on the number of micro-batches alone, which all ranks share. The host waits for the
device once a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from torchspec.config.schema import Config
from torchspec.contracts import StepReport
from torchspec.drafts.draft import Batch, Draft, DraftOptions, DraftOutput
from torchspec.drafts.spec import DraftSpec
from torchspec.knobs import found
from torchspec.parallel.mesh import Sharing, shard_module
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import TargetHead, load_target_head
from torchspec.training.clock import RankClock
from torchspec.training.optimizer import build_optimizer, scale_and_clip, sum_over_ranks
from torchspec.training.schedule import Schedule
from torchspec.training.sums import StepSums, summarise
from torchspec.training.weights import warm_start

log = logging.getLogger(__name__)

Forward = Callable[[Batch], DraftOutput]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is not finite."""


class Learner:
    """See the module's docstring.

    Args:
        draft_ids: [D] int64, the draft's vocabulary as increasing target ids.
        total_steps: of the run. A resume replaces ``schedule``, which is made of it.
    """

    def __init__(
        self,
        config: Config,
        spec: DraftSpec,
        draft_ids: Tensor,
        total_steps: int,
        mesh: DeviceMesh,
        device: torch.device,
        clock: RankClock,
    ):
        self.config, self.spec, self.draft_ids, self.device, self.clock = config, spec, draft_ids, device, clock
        self.schedule, self._dtype = Schedule(((0, total_steps),)), getattr(torch, config.training.dtype)
        self._counts_tokens = mesh.get_local_rank("ring") == mesh.get_local_rank("ulysses") == 0
        formula = config.training.shard_formula(spec.halo)
        sharing = None if formula is None else Sharing(formula, mesh, config.training.sp_gather_once)
        self.draft, self.head = build_draft(config, spec, draft_ids, sharing, device)
        if config.training.compile:
            compile_or_stay_eager(self.draft, device)
        if config.training.sharding == "fsdp2":
            shard_module(self.draft, self.draft.units(), device)
        self.parameters = dict(self.draft.named_parameters())
        self.optimizer = build_optimizer(self.parameters.values(), config.optimizer)

    def step(self, number: int, micro_batches: Sequence[Batch]) -> StepReport:
        """Make optimizer step ``number``. How long its samples took is not in the report.

        Raises:
            TrainingDiverged: the loss or the gradients are not finite; the weights are as they were.
        """
        started = time.perf_counter()
        sums = StepSums(self.spec.positions, self.device)
        with self.clock.span("gradients"):
            add_gradients(self.draft, micro_batches, self._timed_forward, sums, self._counts_tokens)
        grad_norm = reduce_gradients(self.draft, sums, self.config.optimizer.clip)
        *totals, norm = torch.cat([sums.flat, grad_norm.view(1)]).tolist()  # waits for the device
        report = summarise(totals, self.spec.positions, number)
        if not (math.isfinite(report.loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"step {number}: the loss is {report.loss} and the gradient norm {norm}; the weights were not "
                f"changed. Resume from the last checkpoint with a lower optimizer.lr ({self.config.optimizer.lr}) or "
                f"optimizer.clip ({self.config.optimizer.clip})"
            )
        computed = time.perf_counter()
        rate = self.schedule.rate(number, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return replace(
            report,
            learning_rate=rate,
            grad_norm=norm,
            compute_seconds=computed - started,
            optimizer_seconds=time.perf_counter() - computed,
        )

    def evaluate(self, number: int, micro_batches: Sequence[Batch]) -> StepReport:
        """Score held-out samples after step ``number``. Every rank calls it."""
        started = time.perf_counter()
        sums = StepSums(self.spec.positions, self.device)
        with torch.no_grad():
            for batch in micro_batches:
                sums.add(self._forward(batch), int(batch.lengths_B.sum()) if self._counts_tokens else 0)
        dist.all_reduce(sums.flat)
        report = summarise(sums.flat.tolist(), self.spec.positions, number)
        return replace(report, compute_seconds=time.perf_counter() - started, split="heldout")

    def flops(self, micro_batches: Sequence[Batch]) -> float:
        """Operations that the samples of these micro-batches need, whoever shares them."""
        return sum(
            self.spec.flops(tokens, scored)
            for batch in micro_batches
            for tokens, scored in zip(batch.lengths_B.tolist(), batch.loss_mask_BS.sum(1).tolist(), strict=True)
        )

    def _timed_forward(self, batch: Batch) -> DraftOutput:
        with self.clock.span("forward"):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> DraftOutput:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.draft(batch.to(self.device), self.head)


def build_draft(
    config: Config, spec: DraftSpec, draft_ids: Tensor, sharing: Sharing | None, device: torch.device
) -> tuple[Draft, TargetHead]:
    """A float32 draft on ``device``, whole and equal on every rank, and the target's frozen pieces.

    The draft's random weights come from ``run.seed`` alone. ``training.init_from`` replaces them.
    """
    training = config.training
    target = TargetCheckpoint(Path(config.target.path), config.target.trust_remote_code)
    whole = len(draft_ids) == spec.target.vocab_size
    head = load_target_head(target, getattr(torch, training.dtype), device, None if whole else draft_ids)
    options = DraftOptions(found(training.loss_chunk_tokens), training.activation_checkpointing, sharing)
    torch.manual_seed(config.run.seed)
    draft = spec.build(head, target, options)
    if training.init_from is not None:
        warm_start(draft, draft_ids, training.init_from)
    return draft.to(device), head


def compile_or_stay_eager(draft: Draft, device: torch.device) -> None:
    """Compile the draft in place; where no compiler works here, warn once and leave it as it is."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:  # what dynamo turns every failure of its backends into
        reason = str(error).splitlines()[0]
        log.warning("training.compile: no compiler works here, the draft stays eager (%s)", reason)
        return
    draft.compile()


def add_gradients(
    draft: Draft, micro_batches: Sequence[Batch], forward: Forward, sums: StepSums, counts_tokens: bool
) -> None:
    """Forward and backward of this rank's micro-batches; their sums are added to ``sums``.

    Args:
        counts_tokens: False on all but one of the ranks that share samples, whose tokens count once.
    """
    for number, batch in enumerate(micro_batches, start=1):
        if isinstance(draft, FSDPModule):  # gradients are reduced once a step
            draft.set_requires_gradient_sync(number == len(micro_batches))
        output = forward(batch)
        output.total.backward()
        sums.add(output, int(batch.lengths_B.sum()) if counts_tokens else 0)


def reduce_gradients(draft: Draft, sums: StepSums, clip: float) -> Tensor:
    """Sum over all ranks, normalise and clip, in place.

    Returns:
        The gradient norm before clipping; see :func:`scale_and_clip`.
    """
    sharded = isinstance(draft, FSDPModule)
    dist.all_reduce(sums.flat)
    if not sharded and dist.get_world_size() > 1:
        sum_over_ranks(draft.parameters())
    scale = torch.where(sums.denominator > 0, 1.0 / sums.denominator, 1.0)
    return scale_and_clip(draft.parameters(), scale, clip, dist.group.WORLD if sharded else None)
