"""One rank of the training side: the step loop of a run, from top to bottom.

    stream.next() -> forward and backward of each micro-batch -> all-reduce of the sums -> scale, clip, step
        -> step_done -> evaluation and checkpoint where the batch says so

Every rank runs the same sequence of collectives whatever its samples hold: the number of micro-batches and the flags
come with the batch and are equal on all ranks, a rank without samples trains one row of padding, and decisions use
all-reduced values only. The host waits for the device once a step.

Random numbers: the draft's weights come from ``run.seed`` on every rank; after that, rank ``r`` draws from a generator
seeded with ``run.seed + 1 + r``, whose state is part of the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchspec.call_thread import CallThread
from torchspec.config.load import config_text
from torchspec.config.schema import Config
from torchspec.contracts import RankId, RankReport, StepReport
from torchspec.drafts.draft import Batch
from torchspec.drafts.export import export_draft
from torchspec.drafts.spec import DraftSpec
from torchspec.hardware import peak_flops, pick_device
from torchspec.insist import insist_and_wait
from torchspec.knobs import found
from torchspec.parallel.mesh import build_mesh, join_ranks
from torchspec.run_folder import LEDGER_FILE, RunFolder
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.training.checkpoint import (
    CONFIG_FILE,
    CheckpointInfo,
    point,
    prune,
    read_info,
    restore_checkpoint,
    save_checkpoint,
    training_state,
)
from torchspec.training.clock import RankClock, StepProfiler, reporting
from torchspec.training.fetch import FetchedStep, SampleFetcher, StepStream
from torchspec.training.learner import Learner
from torchspec.training.weights import gather_weights


@dataclass(frozen=True)
class TrainerSpec:
    """What a rank is made from. Only ``rank`` differs between the ranks of a run."""

    config: Config
    generation: int
    """Of the training group (``contracts.RankId``)."""
    rank: int
    """Ranks with the same ``rank // training.sp_size`` share samples; ``rank % training.sp_size`` is the shard."""
    world_size: int
    """``training.dp_size * training.sp_size``."""
    address: str
    """Host of rank 0, where the ranks meet; rank 0 binds this address and no other."""
    port: int
    threads: int
    """CPU threads of this rank."""
    draft_ids: np.ndarray
    """int64 [Vd]: the draft vocabulary, as increasing target ids."""
    draft: DraftSpec
    geometry: SampleGeometry
    total_steps: int
    """Of the run."""
    endpoint: StoreEndpoint
    run_dir: Path
    resume: Path | None = None
    """Checkpoint to go on from."""


class Trainer:
    """See the module's docstring. One per process: it joins the process group and sets the number of threads."""

    def __init__(self, spec: TrainerSpec):
        config, training = spec.config, spec.config.training
        self.spec, self.config = spec, config
        self.rank = RankId(spec.generation, spec.rank)
        torch.set_num_threads(spec.threads)
        self.device = torch.device(pick_device(training.device, "training.device"))
        stuck = spec.config.recovery.stuck_seconds
        join_ranks(spec.rank, spec.world_size, spec.address, spec.port, self.device, stuck)
        self.mesh = build_mesh(self.device, training.sp_ulysses_size, training.sp_ring_size)
        peak = config.monitor.peak_flops or peak_flops(self.device, training.dtype)
        self.clock = RankClock(spec.rank, self.device, peak)
        self.learner = Learner(
            config, spec.draft, torch.from_numpy(spec.draft_ids), spec.total_steps, self.mesh, self.device, self.clock
        )
        torch.manual_seed(config.run.seed + 1 + spec.rank)
        self.step = self.saved_step = 0
        if spec.resume is not None:
            learner = self.learner
            info = restore_checkpoint(spec.resume, learner.parameters, learner.optimizer, learner.draft_ids)
            learner.schedule = info.schedule.bent(info.step, spec.total_steps, config.optimizer)
            self.step = self.saved_step = info.step
        self.store = HiddenStateStore(spec.endpoint, found(training.buffer_bytes), "training.buffer_bytes")

    def run(self, controller: Any) -> None:
        """Train what ``controller`` hands out until it says that nothing follows.

        Raises:
            TrainingDiverged: the loss or the gradients are not finite; nothing was saved from that step.
            CheckpointError: a checkpoint could not be saved.
        """
        rank, config = self.rank, self.config
        sp_rank = rank.rank % config.training.sp_size
        pin = self.device.type == "cuda"
        fetcher = SampleFetcher(self.store, self.spec.geometry, sp_rank, config.run.seed, pin_memory=pin)
        heldout = config.evaluation.heldout is not None
        stream = StepStream(controller, rank, fetcher, self.step + 1, config.controller.prefetch_steps, heldout)
        reports = reporting(controller, rank, lambda: self._report(fetcher, stream), config.monitor.history_seconds)
        path = RunFolder(self.spec.run_dir).profile(rank.rank)
        profiler = StepProfiler(config.monitor.profile_steps, path, self.device)
        telling = CallThread("tell")
        told = telling.submit(lambda: None)
        with closing(stream), reports as tell, closing(profiler):
            while True:
                started = time.perf_counter()
                with self.clock.doing("waiting"):
                    fetched = stream.next()
                if fetched is None:
                    break
                batch, waited = fetched.batch, time.perf_counter() - started
                with self.clock.doing("paused"):
                    profiler.before(batch.step)
                report = self._train(fetched, waited)
                told.result()  # of the step before: the step loop does not wait for the controller's answer
                done = rank, batch.step, report if rank.rank == 0 else None
                told = telling.submit(insist_and_wait, controller.step_done, *done)
                with self.clock.doing("paused"):
                    profiler.after(batch.step)
                    if batch.evaluate or batch.checkpoint:
                        tell()  # who compares the pools' loads must know of a pause while it lasts
                    score = self._evaluate(controller, stream.heldout()) if batch.evaluate else None
                    if batch.checkpoint:
                        self._save(controller, score)
            told.result()
            if self.step > self.saved_step:  # stopped between two checkpoints
                with self.clock.doing("paused"):
                    self._save(controller, None)
        self.store.close()

    def ping(self) -> bool:
        """A sign of life, beside :meth:`run`."""
        return True

    def _report(self, fetcher: SampleFetcher, stream: StepStream) -> RankReport:
        return replace(
            self.clock.report(),
            get_seconds=fetcher.get_seconds,
            get_bytes=fetcher.bytes_read,
            get_histogram=fetcher.get_histogram,
            fetched_steps=stream.depth,
        )

    # ---- one optimizer step ----

    def _train(self, fetched: FetchedStep, wait_seconds: float) -> StepReport:
        step = fetched.batch.step
        if step != self.step + 1:  # the ledger and this rank went on from different checkpoints
            raise RuntimeError(f"step {step} does not follow step {self.step}, which the weights of this rank are of")
        self.step = step
        report = self.learner.step(self.step, fetched.micro_batches)
        report = replace(report, wait_seconds=wait_seconds, fetch_seconds=fetched.fetch_seconds)
        self._count(fetched, report)
        return report

    def _count(self, fetched: FetchedStep, report: StepReport) -> None:
        forward, gradients = (self.clock.device_seconds(name) for name in ("forward", "gradients"))
        sharers = self.config.training.sp_size
        batches = [batch for batch in fetched.micro_batches if batch.lengths_B.sum() > 0]
        self.clock.step_made(
            self.step,
            tokens=sum(int(batch.lengths_B.sum()) for batch in batches) // sharers,
            forward_seconds=forward,
            backward_seconds=gradients - forward,
            reduce_seconds=max(0.0, report.compute_seconds - gradients),
            optimizer_seconds=report.optimizer_seconds,
            flops=self.learner.flops(batches) / sharers,
        )

    # ---- after a step ----

    def _evaluate(self, controller: Any, micro_batches: list[Batch]) -> float | None:
        """Score the held-out samples; their simulated accept length, or None without samples."""
        report = self.learner.evaluate(self.step, micro_batches)
        if report.tokens == 0:
            return None
        if self.spec.rank == 0:
            insist_and_wait(controller.heldout_done, self.rank, report)
        return report.accept_length

    def _save(self, controller: Any, score: float | None) -> None:
        """Checkpoint, pointers, rotation, export: in this order, so that each step only adds to what is safe.

        What fails once the checkpoint is safe is told to the controller, and training goes on. A rank of a generation
        that has ended, which may be cut off and know nothing of it, puts nothing in place any more.
        """
        spec, config, run = self.spec, self.config, RunFolder(self.spec.run_dir)
        folder = run.checkpoint(self.step)
        fence = partial(insist_and_wait, controller.require_current, self.rank)
        files = {}
        if spec.rank == 0:
            files[LEDGER_FILE] = insist_and_wait(controller.ledger_snapshot, self.rank, self.step)
            files[CONFIG_FILE] = config_text(config)
        learner = self.learner
        state = training_state(learner.parameters, learner.optimizer, learner.draft_ids)
        info = CheckpointInfo(self.step, learner.schedule, spec.draft, score)
        save_checkpoint(folder, state, info, files, spec.generation, fence)
        self.saved_step = self.step
        if spec.rank == 0:
            best, failure = self._tidy(folder, score)
            insist_and_wait(controller.committed, self.rank, self.step, str(folder), best, failure)
        if config.checkpoint.export:
            weights = gather_weights(learner.parameters)
            if spec.rank == 0:
                failure = self._export(weights, run.export, fence)
                insist_and_wait(controller.exported, self.rank, self.step, failure)

    def _tidy(self, folder: Path, score: float | None) -> tuple[bool, str]:
        """Let ``best`` name the checkpoint in ``folder`` if it is, and remove old ones. What failed, if anything."""
        root, best = folder.parent, False
        try:
            best = score is not None and score > _best_score(root)
            if best:
                point(root, "best", folder)
            prune(root, self.config.checkpoint.keep, self.spec.generation)
        except (ValueError, OSError) as error:
            return best, str(error)
        return best, ""

    def _export(self, weights: Mapping[str, Tensor], folder: Path, fence: Callable[[], None]) -> str:
        """Why it failed, if so: the checkpoint is safe and holds the same draft, so training goes on."""
        try:
            dtype = self.config.checkpoint.export_dtype
            export_draft(self.spec.draft, weights, self.learner.draft_ids, folder, dtype, fence)
        except (ValueError, OSError) as error:
            return str(error)
        return ""


def _best_score(root: Path) -> float:
    """Held-out accept length of the best checkpoint so far; 0 before the first that was evaluated."""
    best = root / "best"
    return (read_info(best).accept_length or 0.0) if best.exists() else 0.0
