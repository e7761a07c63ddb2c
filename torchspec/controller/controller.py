"""The controller: one async Ray actor a run, between the inference pool and the training ranks.

    workers --lease--> [ledger, credits] --publish--> ordered, stored samples --split--> one queue per rank --> ranks
       ^------- fail ------- retry or reject                               step_done --> free objects and credits

Everything waits on futures; nothing polls. The actor holds metadata only: token ids in, references out. All state
changes happen on one event loop, between awaits, so no lock is needed.

**When the controller dies**, Ray runs its constructor again, and :meth:`Controller.begin` rebuilds everything from
the run's folder: sizes from ``config.yaml``, the ledger from the last checkpoint, answers and vocabulary from their
files. Each such *incarnation* has keys of its own, so what a worker still does for an earlier one is thrown away.

**Training ranks** come in generations (``steps.py``): :meth:`Controller.open_group` goes back to the last checkpoint
and starts one, at first, at another size, or after a rank was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

from torchspec.config.load import load_config, save_config, with_values
from torchspec.contracts import (
    Answer,
    FailureKind,
    Lease,
    MicroBatches,
    RankBatch,
    RankId,
    RankReport,
    RunStatus,
    SampleId,
    SampleRef,
    SampleTiming,
    StepReport,
    WorkerReport,
)
from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.inference_pool import InferencePool
from torchspec.controller.leases import Leases
from torchspec.controller.spec import ControllerSpec
from torchspec.controller.status import run_status
from torchspec.controller.steps import GroupEnded, GroupPlan, TrainingGroup
from torchspec.controller.sync import Signal
from torchspec.controller.token_counts import TokenCounts
from torchspec.controller.upkeep import Upkeep
from torchspec.data.vocabulary import DraftVocab
from torchspec.monitor.record.observer import Observer
from torchspec.monitor.record.write_queue import WriteFailed
from torchspec.run_folder import RunFolder

P = ParamSpec("P")
R = TypeVar("R")


class NotBegun(RuntimeError):
    """The controller has started anew, and whoever calls does not know yet."""


def after_begin(
    method: Callable[Concatenate[Controller, P], Awaitable[R]],
) -> Callable[Concatenate[Controller, P], Awaitable[R]]:
    """A method of the driver's: it learns of a new controller at once, by :class:`NotBegun`. Workers just wait."""

    @wraps(method)
    async def checked(self: Controller, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._begun.is_set():
            raise NotBegun("the controller has started anew")
        return await method(self, *args, **kwargs)

    return checked


class Controller:
    """See the module's docstring. Methods named like verbs of workers and ranks are called by them over Ray."""

    def __init__(self, spec: ControllerSpec):
        self.config, self._folder = spec.config, RunFolder(spec.run_dir)
        self.observer = Observer(spec.run_dir, spec.config.monitor.history_seconds)
        self.buffer = SampleBuffer(spec, self.observer, self.advance)
        self.leases = Leases(self.buffer, self.observer)
        self.counts = TokenCounts(spec, self.buffer, self.observer.files.put)
        self.pool = InferencePool(spec.config, running=0)
        self._upkeep = Upkeep(self)
        self._group: TrainingGroup | None = None
        self._begun = asyncio.Event()
        self._stopping = self._finished = False
        self._work = Signal()
        self._asked: dict[str, int] = {}  # calls for leases, by worker

    async def begin(self, running: int | None = None, go_back_to: Path | None = None) -> None:
        """Take up the run at its last checkpoint, or at an older one, ``go_back_to``. No rank is at work, workers wait.

        ``running``: inference workers that are at work already, after the controller has died.

        Raises:
            ValueError: the checkpoint is gone, or of other data, another seed or another batch size.
        """
        if self._begun.is_set():  # it was only out of reach for a while
            return
        if running is not None:
            self.config = load_config(self._folder.config)
            self.pool = InferencePool(self.config, running)
            self.observer.note("the controller was lost; it has started again", "controller_lost")
        await self.buffer.open(self.config, go_back_to)
        self.advance()
        await self.observer.files.written()  # which incarnation this is, before anybody gets a key of it
        self._begun.set()
        self._upkeep.start()

    async def ping(self) -> bool:
        """A sign of life."""
        return True

    # ---- inference workers ----

    async def lease(
        self, worker: str, max_count: int, report: WorkerReport, held: Collection[str] | None = None
    ) -> list[Lease]:
        """Up to ``max_count`` samples for ``worker``, as soon as there is one. Empty: it is no longer needed.

        ``held``: keys of the leases that the worker has, if it cannot know whether it got all that it was given.
        """
        await self._begun.wait()
        await self.observer.files.room()
        if held is not None:
            self.buffer.take_back(worker, held)
        if not self.pool.has_left(worker):  # or its last words come late
            self.observer.workers[worker] = report
        self.pool.joined(worker)
        turn = self._asked[worker] = self._asked.get(worker, 0) + 1  # an older call's answer would reach nobody
        while not (self._finished or self.pool.has_left(worker) or self._asked[worker] != turn):
            leases = self.leases.grant(worker, max_count)
            if leases:
                return leases
            with self.pool.waiting(worker):
                await self._work.wait()
        return []

    async def publish(
        self, worker: str, ref: SampleRef, answer: Answer | None, timing: SampleTiming | None = None
    ) -> None:
        """``worker`` has put a sample in the store, and maybe written its answer. Saying so twice does no harm."""
        await self._begun.wait()
        await self.buffer.publish(ref, answer, timing)

    async def fail(self, worker: str, sample: SampleId, key: str, reason: str, kind: FailureKind) -> None:
        """A lease of ``worker`` came to nothing."""
        await self._begun.wait()
        await self.buffer.fail(worker, sample, key, reason, kind)

    @after_begin
    async def worker_lost(self, worker: str, crashed: bool, hopeless: str = "") -> int:
        """A worker died or was taken away: its leases go back. Returns how many. ``hopeless``: why none follows it."""
        lost = self.buffer.worker_lost(worker, crashed)
        self.pool.drain(worker)
        self.observer.worker_lost(worker, lost)
        if hopeless:
            self.observer.scaled(self.pool.give_up(), hopeless)
        return lost

    @after_begin
    async def worker_left(self, worker: str) -> None:
        """A worker has ended because it was no longer needed."""
        self.pool.drain(worker)
        self.observer.worker_left(worker)

    async def worker_started(self, worker: str) -> None:
        """``worker`` is being started; it will ask for leases once its engine is warm."""
        self.observer.worker_started(worker)

    async def worker_report(self, report: WorkerReport) -> None:
        """What a worker says about itself every now and then, whether or not it has anything to do."""
        self.observer.worker_reported(report)

    # ---- training ranks: whose calls may come twice, where an answer was lost ----

    async def next_batch(self, rank: RankId, step: int) -> RankBatch | None:
        """The work of ``step`` for ``rank``, as soon as it is complete. None: no step follows in its generation.

        Raises:
            GroupEnded: ``rank`` is of an earlier generation (so do all methods that ranks call).
            ValueError: the ledger goes on with another step than ``rank``.
        """
        await self.observer.files.room()
        return await self._group_of(rank).next_batch(rank.rank, step)

    async def fetched(self, rank: RankId, step: int, attempt: int, missing: Iterable[SampleId]) -> RankBatch | None:
        """``rank`` has fetched what it could of ``step``. None: all ranks have everything, go.

        Otherwise the step again with new references: what was missing has been captured once more, and the next
        ``attempt`` follows.
        """
        again = await self._group_of(rank).fetched(rank.rank, step, attempt, missing)
        if again is None and rank.rank == 0:
            self.observer.timelines.mark((r.sample for r in self.buffer.ledger.step_records(step)), "fetched")
        return again

    async def step_done(self, rank: RankId, step: int, report: StepReport | None) -> None:
        """``rank`` has made ``step``. The last rank's call frees the step's samples."""
        group = self._group_of(rank)
        if report is not None:
            self.observer.report(report)
        if group.done(rank.rank, step):
            self.buffer.train(step)

    async def ledger_snapshot(self, rank: RankId, step: int) -> str:
        """The ledger as of ``step``, to be saved inside its checkpoint. The journal is on the disk up to there."""
        await self._group_of(rank).trained(step)  # another rank's step_done may still be on its way
        return await self.buffer.snapshot(step)

    async def require_current(self, rank: RankId) -> None:
        """A rank asks before it puts anything in place in the run's folder: it may have been given up long ago."""
        self._group_of(rank)

    async def committed(self, rank: RankId, step: int, folder: str, best: bool, failure: str) -> None:
        """A checkpoint of ``step`` is safely in ``folder``; a ``failure`` is of what comes after, and does no harm."""
        self._group_of(rank)
        if step > self.buffer.ledger.committed_step:
            self.buffer.commit(step, folder)
            self.observer.committed(step, folder, best, failure)

    async def exported(self, rank: RankId, step: int, failure: str) -> None:
        """The draft of the checkpoint of ``step`` was written; or, with a ``failure``, was not."""
        self._group_of(rank)
        self.observer.exported(step, failure)

    async def heldout_batches(self, rank: RankId, part: int) -> MicroBatches | None:
        """This rank's held-out micro-batches, as many as the store holds at a time, as soon as all are captured.

        Empty tuples where it has fewer, nothing once it has had all of them; None: they will not all be captured.

        Args:
            part: counts from 1; another one follows once all ranks hold it.
        """
        return await self._group_of(rank).heldout_batches(rank.rank, part)

    async def heldout_fetched(self, rank: RankId, part: int, attempt: int, missing: Iterable[SampleId]) -> bool:
        """``rank`` holds these held-out samples now. False: some rank missed one, and all fetch them again."""
        return await self._group_of(rank).heldout_fetched(rank.rank, part, attempt, missing)

    async def heldout_done(self, rank: RankId, report: StepReport) -> None:
        self._group_of(rank)
        self.observer.report(report)

    async def rank_report(self, rank: RankId, report: RankReport) -> None:
        """What a rank says about itself every now and then, also while it waits."""
        if rank.generation == self.buffer.generation:
            self.observer.rank_reported(report)

    def _group_of(self, rank: RankId) -> TrainingGroup:
        if self._group is None or rank.generation != self._group.generation:
            raise GroupEnded(f"generation {rank.generation} of the training group has ended")
        return self._group

    # ---- the driver ----

    @after_begin
    async def draft_vocab(self) -> DraftVocab:
        """The draft's vocabulary, as soon as enough answers have been counted, and it is written down."""
        vocabulary = await self.counts.vocabulary()
        await self.observer.files.written()
        return vocabulary

    @after_begin
    async def open_group(self) -> GroupPlan:
        """Start a generation of ranks from the last checkpoint; others are over. Raises ValueError: it is gone."""
        buffer, training = self.buffer, self.config.training
        if self._group is not None:
            self.observer.trainer_ended(broken=not self._group.closing)
            self._group.end()
            buffer.rewind()
        buffer.open_group(training)
        self._group = TrainingGroup(buffer, self.config, self._stopping)
        self.observer.trainer_started(buffer.generation, training.dp_size, training.sp_size)
        self.advance()
        await self.observer.files.written()  # which generation this is, before it begins
        return GroupPlan(buffer.generation, training, buffer.checkpoint)

    @after_begin
    async def training_over(self) -> bool:
        """Whether no generation follows the one that has ended."""
        return self._stopping or self.buffer.ledger.exhausted

    @after_begin
    async def scale_inference(self, workers: int | Literal["auto"]) -> None:
        """Have so many inference workers; ``auto``: as many as training needs."""
        await self._decide({"inference.workers": workers})
        message = f"inference workers: {workers} asked for, {len(self.observer.workers)} there"
        self.observer.note(message, "scaled", workers=workers)
        self.pool.ask_for(workers)

    @after_begin
    async def scale_training(self, sizes: dict[str, int | str]) -> None:
        """Go on with other values of these knobs of ``training`` after the steps that are formed, from a checkpoint.

        Raises:
            ValueError: the config does not allow them.
        """
        await self._decide({f"training.{knob}": value for knob, value in sizes.items()})
        training = self.config.training
        message = f"training goes on with dp_size {training.dp_size} and sp_size {training.sp_size}"
        self.observer.note(message, "scaled", dp_size=training.dp_size, sp_size=training.sp_size)
        self.buffer.split(training)
        if self._group is not None:
            self._group.close()

    async def _decide(self, values: Mapping[str, int | str]) -> None:
        """What is asked for is kept before it is acted on: a controller or a resume after this one goes on with it."""
        self.config = with_values(self.config, values)
        self.observer.files.put(save_config, self.config, self._folder.config)
        await self.observer.files.written()

    @after_begin
    async def wanted(self, seen: int | None) -> int:
        """How many inference workers there should be, as soon as that is not ``seen``.

        Raises:
            WriteFailed: the run cannot go on. The driver always has a call of this open.
        """
        while self.pool.wanted == seen and not self._upkeep.failure:
            await self.pool.changed.wait()
        if self._upkeep.failure:
            raise WriteFailed(self._upkeep.failure)
        return self.pool.wanted

    @after_begin
    async def drain(self, worker: str) -> None:
        """Give ``worker`` no more leases: it ends by itself when it has finished those that it has."""
        self.pool.drain(worker)
        self._work.fire()

    @after_begin
    async def store_away(self) -> None:
        """The store does not answer, or has lost a part: no leases until it is back."""
        self.buffer.store_away = True
        self.observer.note("the store is away", "store_lost")

    @after_begin
    async def store_back(self) -> None:
        """The store is there again, and empty. Ranks find out by themselves what they have not fetched yet."""
        self.buffer.store_away = False
        self.buffer.forget(lambda _: False)
        self.observer.note("the store is back, empty: what was in it is captured again", "store_back")
        self.buffer.unpark()
        self._work.fire()

    @after_begin
    async def request_stop(self, reason: str) -> None:
        """No new step, no new sample: ranks end after the steps they already have."""
        self.observer.note(f"stopping after the current step: {reason}", "stopping")
        self._stopping = self.leases.of_steps_only = True
        if self._group is not None:
            self._group.close()
        self._work.fire()

    @after_begin
    async def finish(self) -> None:
        """Training has ended: workers may go, files are closed."""
        self._finished = True
        self._work.fire()
        await self.buffer.close()
        self._upkeep.end()
        self.observer.ended(self._phase(), self.buffer.ledger.trained_step)
        await self.observer.record(await self.status())
        await self.observer.close()

    @after_begin
    async def steps_since(self, count: int) -> list[StepReport]:
        """Reports after the first ``count``, for trackers, which never ask for those again."""
        return self.observer.steps_since(count)

    @after_begin
    async def status(self) -> RunStatus:
        return run_status(self.config, self._phase(), self.buffer, self.pool, self._group, self.observer)

    def _phase(self) -> str:
        if self._finished:
            return "stopped" if self._stopping else "finished"
        if self._stopping:
            return "stopping"
        return "training" if self.counts.vocab is not None else "counting-vocabulary"

    def observe_pools(self) -> None:
        """While ranks start, evaluate or save, nobody waits for samples and the store fills: that says nothing."""
        if self._group is None or not self._group.at_work:
            self.pool.begin_stretch(self.buffer.ledger.trained_step)
        elif not self.observer.ranks_pause:
            self.pool.observe(self._group.starved, self.leases.busy)

    def advance(self) -> None:
        """Something has changed: let ranks, workers and who waits for the vocabulary see."""
        self.counts.update()
        if self._group is not None:
            self._group.advance()
        if self.leases.anything():  # nobody is woken in vain, once for each sample
            self._work.fire()
