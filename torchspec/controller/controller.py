"""The controller: one async Ray actor a run, between the inference pool and the training ranks.

    workers --lease--> [ledger, credits] --publish--> ordered, stored samples --split--> one queue per rank --> ranks
       ^------- fail ------- retry or reject                               step_done --> free objects and credits

Everything waits on futures; nothing polls. The actor holds metadata only: token ids in, references out. All state
changes happen on one event loop, between awaits, so no lock is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torchspec.config.schema import Config
from torchspec.contracts import (
    HELDOUT_EPOCH,
    Answer,
    FailureKind,
    Lease,
    RankBatch,
    RunStatus,
    SampleId,
    SampleRef,
    StepReport,
    WorkerReport,
)
from torchspec.controller.batching import MicroBatches, split_batch
from torchspec.controller.credits import Credits
from torchspec.controller.journal import JsonLines
from torchspec.controller.ledger import Ledger, LedgerShape, Record
from torchspec.controller.objects import StoredObjects
from torchspec.controller.observer import Observer
from torchspec.controller.samples import Samples
from torchspec.controller.sync import FetchRound, Signal
from torchspec.controller.vocabulary import VocabularyCount
from torchspec.data.draft_vocab import DraftVocab
from torchspec.data.prompt_set import PromptSet
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerSpec:
    """What a controller is made from."""

    config: Config
    train: PromptSet
    heldout: PromptSet | None
    geometry: SampleGeometry
    """Shapes and bytes of a sample of this target."""
    vocab_size: int
    end_token_ids: tuple[int, ...]
    """Tokens that end an answer: always in the draft's vocabulary."""
    endpoint: StoreEndpoint
    credit_bytes: int
    run_dir: Path
    resumed: bool = False
    ledger_snapshot: str | None = None
    """``ledger.json`` of the checkpoint to resume from; None when there was no checkpoint yet."""


class Controller:
    """See the module's docstring. Methods named like verbs of workers and ranks are called by them over Ray."""

    def __init__(self, spec: ControllerSpec):
        config = spec.config
        self.spec, self.config = spec, config
        self.world_size = config.training.world_size
        self.ledger = Ledger(
            LedgerShape(
                spec.train.content_hash,
                len(spec.train),
                config.training.epochs,
                config.training.batch_size,
                config.run.seed,
            ),
            config.controller.reorder_window,
            config.controller.max_attempts,
            config.training.max_steps,
        )
        heldout = len(spec.heldout) if spec.heldout else 0
        self.heldout = Ledger(
            LedgerShape(
                spec.heldout.content_hash if spec.heldout else "", heldout, 1, max(1, heldout), config.run.seed
            ),
            max(1, heldout),
            config.controller.max_attempts,
            first_epoch=HELDOUT_EPOCH,
        )
        self.journal = JsonLines(spec.run_dir / "ledger.jsonl")
        self.rejections = JsonLines(spec.run_dir / "rejected.jsonl")
        self._observer = Observer(spec.run_dir)
        self.samples = Samples(
            spec.train, spec.heldout, spec.run_dir / "answers.jsonl", config.answer.reuse, config.run.seed
        )
        if spec.ledger_snapshot is not None:
            self.ledger.restore(spec.ledger_snapshot)
        line = {name: getattr(self.ledger.shape, name) for name in LedgerShape.__dataclass_fields__}
        limits = {"max_steps": config.training.max_steps, "reorder_window": config.controller.reorder_window}
        self.journal.write({"event": "started", **line, **limits})
        if spec.resumed:
            self.journal.write({"event": "resumed", "step": self.ledger.committed_step})
        self.credits = Credits(spec.credit_bytes)
        self.objects = StoredObjects(spec.endpoint, spec.geometry.suffixes)

        self._batches: dict[int, list[RankBatch]] = {}
        self._next_step = [self.ledger.committed_step + 1] * self.world_size
        self._rounds: dict[int, FetchRound] = {}
        self._acks: dict[int, set[int]] = {}
        self._gone: set[str] = set()
        self._stopping = False
        self._finished = False
        self._work = Signal()
        self._batch = Signal()
        first = range(min(config.draft.vocab_prompts, len(spec.train)))
        self._vocabulary = VocabularyCount(
            spec.run_dir / "draft_vocab.json",
            spec.train,
            [self.ledger.sample_at(p) for p in first],
            config.draft.vocab_size,
            spec.vocab_size,
            spec.end_token_ids,
            config.data.cache_dir,
        )
        self._count_vocab()

    # ---- inference workers ----

    async def lease(self, worker: str, max_count: int, report: WorkerReport) -> list[Lease]:
        """Up to ``max_count`` samples for ``worker``, as soon as there is one. Empty: it is no longer needed."""
        self._observer.workers[worker] = report
        while not (self._finished or self._stopping or worker in self._gone):
            leases = self._grant(worker, max_count)
            if leases:
                return leases
            await self._work.wait()
        return []

    async def publish(self, worker: str, ref: SampleRef, answer: Answer | None) -> None:
        """``worker`` has put a sample in the store, and maybe written its answer."""
        if ref.sharding != self.spec.geometry.sharding:
            reason = f"{worker} stores samples as {ref.sharding}, the trainer reads {self.spec.geometry.sharding}"
            await self.fail(worker, ref.sample, ref.key, reason, "retry")
            return
        record = self._ledger(ref.sample).store(ref)
        if record is None:
            log.info("discarding %s: its lease had been given to somebody else", ref.key)
            await self.objects.remove([ref.key])
            return
        self._observer.stored(ref.num_tokens)
        if answer is not None:
            self.samples.add_answer(ref.sample, answer)
        fits = self.credits.reserve(ref.sample, self.spec.geometry.stored_bytes(ref.num_tokens))
        assert fits, f"{ref.key} is larger than its lease allowed"
        self._count_vocab()
        self._advance()
        if ref.sample.epoch == HELDOUT_EPOCH:  # maybe the last that was missing
            self._batch.fire()
        if self._something_to_lease():  # it holds fewer credits now; nobody is woken in vain, once for each sample
            self._work.fire()

    async def fail(self, worker: str, sample: SampleId, key: str, reason: str, kind: FailureKind) -> None:
        """A lease came to nothing. What may be stored under its key is of no use any more."""
        await self.objects.remove([key])
        ledger = self._ledger(sample)
        if kind == "no_room":
            displaced = ledger.defer(sample, key, reason)
            if displaced is not None:
                await self.objects.remove([displaced])
            self._settle(ledger, [sample])
        elif ledger.fail(sample, key, reason, final=kind == "final") is not None:
            self._observer.note(f"{worker} failed {self.samples.name(sample)}: {reason}")
            self._settle(ledger, [sample])

    async def worker_lost(self, worker: str) -> int:
        """A worker died or was taken away: its leases go back. Returns how many."""
        self._gone.add(worker)
        self._observer.workers.pop(worker, None)
        lost = 0
        for ledger in (self.heldout, self.ledger):
            records = ledger.worker_lost(worker)
            lost += len(records)
            self._settle(ledger, [r.sample for r in records])
        self._observer.note(f"{worker} is gone; {lost} of its leases are pending again")
        return lost

    def _grant(self, worker: str, max_count: int) -> list[Lease]:
        leases: list[Lease] = []
        for ledger in (self.heldout, self.ledger):
            while len(leases) < max_count:
                record = ledger.next_to_lease()
                if record is None or self.samples.being_answered(record.sample, self.ledger.is_leased):
                    break
                tokens, lease = self.samples.describe(record.sample)
                size = self.spec.geometry.stored_bytes(tokens)
                if not self.credits.reserve(record.sample, size):
                    return leases
                ledger.lease(record, worker, self.config.run.name)
                leases.append(replace(lease, key=record.key, credit_bytes=size))
        return leases

    def _something_to_lease(self) -> bool:
        for ledger in (self.heldout, self.ledger):
            record = ledger.next_to_lease()
            if record is not None:
                tokens, _ = self.samples.describe(record.sample)
                return self.credits.fits(record.sample, self.spec.geometry.stored_bytes(tokens))
        return False

    # ---- training ranks ----

    async def next_batch(self, rank: int) -> RankBatch | None:
        """The next step's work for ``rank``, as soon as it is complete. None: no step follows."""
        step = self._next_step[rank]
        while step not in self._batches:
            if self._stopping or self.ledger.exhausted:
                return None
            await self._batch.wait()
        self._next_step[rank] += 1
        return self._batches[step][self._group(rank)]

    async def fetched(self, rank: int, step: int, missing: Iterable[SampleId]) -> RankBatch | None:
        """``rank`` has fetched what it could of ``step``. None: all ranks have everything, go.

        Otherwise the step again with new references: what was missing has been captured once more.
        """
        round_ = self._rounds.setdefault(step, FetchRound(self.world_size))
        round_.report(rank, missing)
        if round_.complete:
            if round_.missing:
                self._lose(self.ledger, step, round_.missing)
            else:
                del self._rounds[step]
                round_.decide(None)
        batches = await round_.outcome()
        return None if batches is None else batches[self._group(rank)]

    async def step_done(self, rank: int, step: int, report: StepReport | None) -> None:
        """``rank`` has made ``step``. The last rank's call frees the step's samples."""
        if report is not None:
            self._observer.report(report)
        acks = self._acks.setdefault(step, set())
        acks.add(rank)
        if len(acks) < self.world_size:
            return
        del self._acks[step]
        records = self.ledger.step_records(step)
        self.ledger.train(step)
        batch = {"step": step, "end": self.ledger.trained_cursor, "samples": [r.sample for r in records]}
        self.journal.write({"event": "trained", **batch})
        del self._batches[step]
        self._observer.trained(len(records), sum(r.ref.num_tokens for r in records if r.ref))
        self._free(records)
        self._advance()
        self._batch.fire()
        self._work.fire()

    async def ledger_snapshot(self, step: int) -> str:
        """The ledger as of ``step``, to be saved inside its checkpoint."""
        return self.ledger.snapshot(step)

    async def committed(self, step: int, folder: str, best: bool) -> None:
        """A checkpoint of ``step`` is safely in ``folder``."""
        while self.ledger.trained_step < step:  # another rank's step_done is still on its way
            await self._batch.wait()
        self.ledger.commit(step)
        self.journal.write({"event": "committed", "step": step, "folder": folder})
        self._observer.note(f"checkpoint {folder}" + (" (best so far)" if best else ""))

    async def heldout_batches(self, rank: int) -> MicroBatches:
        """This rank's held-out micro-batches, as soon as all are captured. Empty tuples where it has fewer."""
        while not (self.heldout.steps or self.heldout.exhausted):
            if self._stopping:
                return ()
            await self._batch.wait()
        if not self.heldout.steps:
            return ()
        return self._split(self.heldout, 1)[self._group(rank)]

    async def heldout_fetched(self, rank: int, missing: Iterable[SampleId]) -> bool:
        """``rank`` holds its held-out samples now. False: some rank missed one; ask ``heldout_batches`` again."""
        round_ = self._rounds.setdefault(HELDOUT_EPOCH, FetchRound(self.world_size))
        round_.report(rank, missing)
        if round_.complete:
            del self._rounds[HELDOUT_EPOCH]
            if round_.missing:
                self._lose(self.heldout, 1, round_.missing)
                while any(r.state != "assigned" for r in self.heldout.step_records(1)):
                    await self._batch.wait()
            else:
                records = self.heldout.step_records(1)
                self.heldout.train(1)
                self._free(records)
            round_.decide([] if round_.missing else None)
        return await round_.outcome() is None

    async def heldout_done(self, report: StepReport) -> None:
        self._observer.report(report)

    # ---- the driver ----

    async def draft_vocab(self) -> DraftVocab:
        """The draft's vocabulary, as soon as enough answers have been counted."""
        while self._vocabulary.vocab is None:
            await self._batch.wait()
        return self._vocabulary.vocab

    async def request_stop(self, reason: str) -> None:
        """No new step, no new lease: ranks end after the steps they already have."""
        self._observer.note(f"stopping after the current step: {reason}")
        self._stopping = True
        self._work.fire()
        self._batch.fire()

    async def finish(self) -> None:
        """Training has ended: workers may go, files are closed."""
        self._finished = True
        self._work.fire()
        await self.objects.close()
        for file in (self.journal, self.rejections, self._observer):
            file.close()

    async def steps_since(self, count: int) -> list[StepReport]:
        """Reports after the first ``count``, for trackers."""
        return self._observer.steps[count:]

    async def status(self) -> RunStatus:
        return self._observer.status(self.config, self._phase(), self.ledger, self.heldout, self.credits)

    def _phase(self) -> str:
        if self._finished:
            return "finished"
        if self._stopping:
            return "stopping"
        return "training" if self._vocabulary.vocab is not None else "counting-vocabulary"

    # ---- assembling steps ----

    def _advance(self) -> None:
        """Form every step that can be formed, complete every round that waits for lost samples, tell the ranks of a new
        step: of a sample alone nobody is told, there may be many ranks."""
        news = False
        ahead = self.ledger.trained_step + self.config.controller.prefetch_steps
        while not self._stopping and max(self._batches, default=self.ledger.trained_step) < ahead:
            step = self.ledger.assign()
            if step is None:
                break
            self._batches[step] = self._rank_batches(step)
            news = True
        for step, round_ in list(self._rounds.items()):
            complete = step > 0 and all(r.state == "assigned" for r in self.ledger.step_records(step))
            if round_.complete and complete:
                del self._rounds[step]
                self._batches[step] = self._rank_batches(step)
                round_.decide(self._batches[step])
        if not self._stopping:  # some ranks may already have been told that there will be no held-out batches
            self.heldout.assign()
        if news:
            self._batch.fire()

    def _rank_batches(self, step: int) -> list[RankBatch]:
        evaluation = self.config.evaluation
        last = self.ledger.is_last(step)
        checkpoint = last or step % self.config.checkpoint.every_steps == 0
        evaluate = evaluation.heldout is not None and (checkpoint or step % evaluation.every_steps == 0)
        return [
            RankBatch(step=step, micro_batches=micro_batches, checkpoint=checkpoint, evaluate=evaluate, last=last)
            for micro_batches in self._split(self.ledger, step)
        ]

    def _split(self, ledger: Ledger, step: int) -> list[MicroBatches]:
        refs = [r.ref for r in ledger.step_records(step) if r.ref is not None]
        return split_batch(refs, self.config.training.dp_size, self.config.training.micro_batch_size)

    # ---- losing, freeing, rejecting ----

    def _lose(self, ledger: Ledger, step: int, samples: set[SampleId]) -> None:
        for record in [r for r in ledger.step_records(step) if r.sample in samples]:
            self._observer.note(f"the store lost {self.samples.name(record.sample)}; it is captured again")
            ledger.lose(record.sample, record.key)
        self._settle(ledger, samples)

    def _settle(self, ledger: Ledger, samples: Iterable[SampleId]) -> None:
        """After failures: report what was rejected for good, and let the others go on."""
        rejected = {r.sample: r for r in ledger.rejected.values()}
        for sample in samples:
            if sample in rejected:
                self.credits.release(sample)
                line = {"id": self.samples.name(sample), "sample": list(sample), "reason": rejected[sample].reason}
                self.rejections.write(line)
                self.journal.write({"event": "rejected", **line})
                self._observer.note(f"rejected {line['id']}: {line['reason']}")
        self._count_vocab()
        self._advance()
        self._batch.fire()
        self._work.fire()

    def _free(self, records: list[Record]) -> None:
        """Remove the samples' objects, then give back their credits: never the other way round."""

        def gone() -> None:
            for record in records:
                self.credits.release(record.sample)
            for ledger in (self.heldout, self.ledger):
                ledger.room()
            self._work.fire()

        self.objects.remove_soon([r.key for r in records], gone)

    # ---- the draft's vocabulary ----

    def _count_vocab(self) -> None:
        if self._vocabulary.vocab is not None:
            return
        rejected = {r.sample for r in self.ledger.rejected.values()}
        if self._vocabulary.update(self.samples.answer, rejected):
            self._batch.fire()

    # ---- small things ----

    def _group(self, rank: int) -> int:
        """The data-parallel group of ``rank``: the ranks that share its samples, neighbours in number."""
        return rank // self.config.training.sp_size

    def _ledger(self, sample: SampleId) -> Ledger:
        return self.heldout if sample.epoch == HELDOUT_EPOCH else self.ledger
