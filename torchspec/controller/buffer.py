"""The buffer of a run: which state each sample is in, what it holds of the store, and what has been written down.

Whatever happens to a sample is entered here, together with what follows from it:

    call            caller        state before -> after                      credits                   who may go on
    lease           workers       pending -> leased                          upper bound reserved      -
    publish         workers       leased -> stored (or to its step)          true size                 ranks
    fail            workers       leased -> pending | rejected               kept | released           workers, ranks
    take_back       workers       leased -> pending                          kept                      who asked
    worker_lost     driver        leased -> pending | rejected               kept | released           workers, ranks
    make_room       workers       stored -> pending, the furthest behind     released once removed     workers
    ledger.assign   ranks         stored -> assigned                         kept                      ranks
    lose            ranks         assigned -> pending, keeps its step        kept                      workers
    train           ranks         assigned -> trained                        released once removed     workers
    hold_heldout    ranks         assigned -> trained, held-out samples      released once removed     workers
    commit          rank 0        trained -> committed                       -                         -
    split, forget   driver        stored -> pending                          released once removed     workers
    rewind          driver        assigned -> stored, trained -> pending     released where pending    workers, ranks

An object leaves the store before its credits are given back, never the other way round: so the store always has what
the credits promise. ``changed`` is told after every change that lets somebody go on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchspec.config.schema import Config, TrainingConfig
from torchspec.contracts import HELDOUT_EPOCH, Answer, FailureKind, Lease, SampleId, SampleRef, SampleTiming
from torchspec.controller.journal import read_journal
from torchspec.controller.ledger import Ledger
from torchspec.controller.ledger_snapshot import Rejection, heldout_shape, ledger_shape
from torchspec.controller.objects import Credits, StoredObjects
from torchspec.controller.prompts import AnswerBook, Prompts, Writer
from torchspec.controller.records import Record
from torchspec.controller.spec import ControllerSpec
from torchspec.files import Damage, JsonLines
from torchspec.monitor.record.observer import Observer
from torchspec.run_folder import LEDGER_FILE, RunFolder
from torchspec.store.geometry import SampleGeometry

log = logging.getLogger(__name__)


class SampleBuffer:
    """See the module's docstring."""

    def __init__(self, spec: ControllerSpec, observer: Observer, changed: Callable[[], None]):
        config, self._halo = spec.config, spec.halo
        self._folder, self._run = RunFolder(spec.run_dir), config.run.name
        self._observer, self._changed = observer, changed
        window, max_failures = config.controller.reorder_window, config.controller.max_attempts
        shape, max_steps = ledger_shape(config, spec.train), config.training.max_steps
        self.ledger = Ledger(shape, window, max_failures, max_steps, moved=observer.timelines.moved)
        shape = heldout_shape(config, spec.heldout, spec.room_beside_a_batch)
        self.heldout = Ledger(
            shape, shape.batch_size, max_failures, first_epoch=HELDOUT_EPOCH, moved=observer.timelines.moved
        )
        self.ledgers = self.heldout, self.ledger  # held-out samples come first
        put = observer.files.put
        self._journal, self._rejections = JsonLines(self._folder.journal, put), JsonLines(self._folder.rejected, put)
        answers, writer = self._folder.answers, Writer.of(config.answer, spec.target_fingerprint)
        book = AnswerBook(answers, writer, config.answer.reuse, self._tell, put)
        self.prompts = Prompts(spec.train, spec.heldout, book, config.run.seed)
        self.credits, self._objects = Credits(spec.credit_bytes), StoredObjects(spec.endpoint)
        self._making_room = False
        self.store_away = False
        """Nothing is leased, and nothing that fails is held against a sample."""
        self.counted_first = 0
        """Positions before this are all answered before any is trained; 0 once they are."""
        self.geometry = spec.geometry
        """Of the samples that are leased from now on, but for those of steps that are formed."""
        self._formed_geometry = spec.geometry
        """Of samples of formed steps: as the present group of ranks reads them."""
        self.generation = 0
        """Of the training group; counted through the run."""
        self.checkpoint: Path | None = None
        """That the ledger goes on from, and so the training group; None: the beginning."""
        self._key_prefix = f"{self._run}/{secrets.token_hex(4)}"
        """Of this controller's keys; no other one of the run has the same."""

    # ---- opening and closing ----

    async def open(self, config: Config, go_back_to: Path | None = None) -> None:
        """Take up the run where its last checkpoint is, or at an older one.

        Raises:
            ValueError: the checkpoint is gone, or of other data, another seed or another batch size.
        """
        self.geometry = replace(self.geometry, sharding=config.training.shard_formula(self._halo))
        journal = read_journal(self._folder.journal, self._tell)
        self.generation = journal.generation
        self.checkpoint = go_back_to or self._folder.last_checkpoint(journal.committed_step)
        self.ledger.rewind(self._saved())
        limits = {"max_steps": config.training.max_steps, "reorder_window": config.controller.reorder_window}
        self._journal.write({"event": "started", **asdict(self.ledger.shape), **limits})
        if journal.started:
            self._journal.write({"event": "resumed", "step": self.ledger.committed_step})
            self._observer.resumed(self.ledger.committed_step)
        self._objects.expect(self.geometry.suffixes)
        await self._objects.connect()
        if journal.started:
            await self._objects.remove_all(f"{self._run}/")

    async def sweep(self) -> None:
        """Remove what lies in the store and is nobody's: a put may end long after its lease was given to another."""
        keys = [record.key for ledger in self.ledgers for record in ledger.records.values()]
        if count := await self._objects.sweep(f"{self._run}/", keys):
            self._observer.note(f"removed {count} objects from the store that belonged to no sample", objects=count)

    async def close(self) -> None:
        """All that is of no use any more leaves the store first."""
        await self._objects.close()
        self._journal.close()
        self._rejections.close()

    def open_group(self, training: TrainingConfig) -> None:
        """A new generation of ranks goes on from :attr:`checkpoint`."""
        self.generation += 1
        self._formed_geometry = replace(self.geometry, sharding=training.shard_formula(self._halo))
        group = {"generation": self.generation, "step": self.ledger.committed_step}
        sizes = {"dp_size": training.dp_size, "sp_size": training.sp_size}
        self._journal.write({"event": "group", **group, **sizes})

    # ---- pending -> leased -> stored ----

    def lease_bytes(self, record: Record) -> int:
        """Credits that a lease of this sample takes: what it may come to in the store."""
        return self._geometry(record).stored_bytes(self.prompts.max_tokens(record.sample))

    def lease(self, ledger: Ledger, record: Record, worker: str) -> Lease | None:
        """Lease a sample, if the credits reach."""
        size = self.lease_bytes(record)
        if not self.credits.reserve(record.sample, size):
            return None
        ledger.lease(record, worker, self._key_prefix)
        lease = self.prompts.describe(record.sample)
        return replace(lease, key=record.key, credit_bytes=size, sharding=self._geometry(record).sharding)

    async def publish(self, ref: SampleRef, answer: Answer | None, timing: SampleTiming | None) -> None:
        """A sample is in the store. Hearing of it twice does no harm."""
        ledger = self._ledger_of(ref.sample)
        if ledger.is_stored(ref.sample, ref.key):
            return
        record = ledger.leased(ref.sample, ref.key)
        if answer is not None:
            self.prompts.add_answer(ref.sample, answer)
        if record is None or ref.sharding != self._geometry(record).sharding:
            log.info("discarding %s: its lease had been given to somebody else, or the layout has changed", ref.key)
            await self._objects.remove([ref.key])
            if (record := ledger.leased(ref.sample, ref.key)) is not None:
                ledger.put_back(record)
        else:
            ledger.store(record, ref)
            self._observer.stored(ref, timing)
            fits = self.credits.reserve(ref.sample, self._geometry(record).stored_bytes(ref.num_tokens))
            assert fits, f"{ref.key} is larger than its lease allowed"
        self._changed()

    async def fail(self, worker: str, sample: SampleId, key: str, reason: str, kind: FailureKind) -> None:
        """A lease came to nothing. What may be stored under its key is of no use any more."""
        ledger = self._ledger_of(sample)
        await self._objects.remove([key])
        record = ledger.leased(sample, key)
        if record is None:
            return
        if kind == "no_store" or (kind == "no_room" and self.store_away):
            ledger.put_back(record)
        elif kind == "no_room":
            displaced = ledger.defer(record)
            if displaced is not None:
                await self._objects.remove([displaced])
        else:
            ledger.fail(record, reason, final=kind == "final")
            self._observer.failed(worker, sample, self.prompts.name(sample), reason)
        self._settle(ledger, [record])

    def take_back(self, worker: str, held: Iterable[str]) -> None:
        """Leases that ``worker`` was given and never got are pending again. ``held``: the keys of the others."""
        for ledger in self.ledgers:
            for record in [r for r in ledger.leased_to(worker) if r.key not in held]:
                ledger.put_back(record)

    def worker_lost(self, worker: str, crashed: bool) -> int:
        """A worker is gone: its leases go back. Returns how many.

        Args:
            crashed: by itself, so one of them may be to blame.
        """
        keys = [record.key for ledger in self.ledgers for record in ledger.leased_to(worker)]
        self._objects.remove_twice(keys)
        if not crashed:
            self.take_back(worker, ())
            self._changed()
            return len(keys)
        for ledger in self.ledgers:
            self._settle(ledger, ledger.worker_lost(worker, alone=len(keys) == 1))
        return len(keys)

    def displaces(self, ledger: Ledger, record: Record) -> bool:
        """Whether samples behind ``record`` give up their credits where it finds none.

        Training's leases are given out from the front, so nothing behind holds credits that the front needs; but after
        a rewind the front has lost its own. While answers are counted, those that are there make room for those to
        come, and are prefilled again when training comes to them.
        """
        return ledger is self.heldout or record.attempts > 0 or record.position < self.counted_first

    def make_room(self, ledger: Ledger, record: Record) -> None:
        """Let the sample furthest behind ``record`` give up its credits, one at a time."""
        if self._making_room or not self.displaces(ledger, record):
            return
        behind = record.position if ledger is self.ledger and record.position >= self.counted_first else -1
        victim = self.ledger.furthest_behind(behind, self.credits.held)
        if victim is None:
            return

        def made() -> None:
            self._making_room = False

        self._making_room = True
        if victim.state == "stored":
            give_up = self.ledger.pass_over if self.counted_first else self.ledger.put_back
            give_up(victim)
        self._drop([victim], made)

    def all_counted(self) -> None:
        """Training may begin: from now on, samples are made in its order."""
        self.counted_first = 0
        self.ledger.take_up()

    # ---- assigned -> trained -> committed ----

    def lose(self, ledger: Ledger, step: int, samples: set[SampleId]) -> None:
        """The store has lost samples of a formed step: they are captured again."""
        lost = [r for r in ledger.step_records(step) if r.sample in samples and r.state == "assigned"]
        for record in lost:
            self._observer.sample_lost(record.sample, self.prompts.name(record.sample))
            ledger.put_back(record, "not in the store")
        self._objects.remove_soon([record.key for record in lost])  # they may only have been out of reach
        self._changed()

    def train(self, step: int) -> None:
        """All ranks have made ``step``."""
        records = self.ledger.step_records(step)
        self.ledger.train(step)
        batch = {"step": step, "end": self.ledger.trained_cursor, "samples": [r.sample for r in records]}
        self._journal.write({"event": "trained", **batch})
        self._observer.trained(len(records), sum(r.ref.num_tokens for r in records if r.ref))

        def freed() -> None:
            self.unpark()
            timelines = self._observer.timelines
            for record in records:
                if record.ref is not None and timelines.follows(record.sample):  # there may have been a rewind
                    tokens = self.prompts.tokens(record.sample)
                    timelines.finish(record.ref, self.prompts.name(record.sample), record.step, *tokens)

        self._drop(records, freed)
        self._changed()

    def hold_heldout(self, step: int) -> None:
        """All ranks have these held-out samples in their memory."""
        records = self.heldout.step_records(step)
        self.heldout.train(step)
        self._drop(records, self.unpark)

    async def snapshot(self, step: int) -> str:
        """The ledger as of ``step``. The journal is on the disk up to there."""
        snapshot = self.ledger.snapshot(step)
        self._journal.sync()
        await self._observer.files.written()
        return snapshot

    def commit(self, step: int, folder: str) -> None:
        """A checkpoint of ``step`` is safely in ``folder``."""
        self.ledger.commit(step)
        self._journal.write({"event": "committed", "step": step, "folder": folder})

    # ---- and back again ----

    def split(self, training: TrainingConfig) -> None:
        """From now on, store samples as groups of this size read them; others are captured again."""
        sharding = training.shard_formula(self._halo)
        if sharding == self.geometry.sharding:
            return
        self.geometry = replace(self.geometry, sharding=sharding)
        self._objects.expect(self.geometry.suffixes)
        self.forget(self._usable)

    def forget(self, keep: Callable[[SampleRef], bool]) -> None:
        """Capture again what is stored and ``keep`` does not want, but for what formed steps need."""
        for ledger in self.ledgers:
            self._drop(ledger.forget_objects(keep))

    def unpark(self) -> None:
        """What waits for room in the store may try again."""
        for ledger in self.ledgers:
            ledger.unpark()

    def rewind(self) -> None:
        """Go to the last checkpoint: what the ranks that have ended did after it is undone.

        Raises:
            ValueError: it is gone.
        """
        known, trained = self.ledger.committed_step, self.ledger.trained_step
        self.checkpoint = self._folder.last_checkpoint(known)
        useless = self.ledger.rewind(self._saved(), self._usable)
        step = self.ledger.committed_step
        if step > known:  # its rank died before it could tell
            self._journal.write({"event": "committed", "step": step})
        if step < trained:
            self._journal.write({"event": "resumed", "step": step})
            self._observer.note(f"going back to step {step}: {trained - step} steps are made again", step=step)
            for position, rejection in sorted(self.ledger.rejected.items()):
                if position >= self.ledger.committed_cursor:
                    self._journal_rejection(rejection)
        useless += self.heldout.rewind(None, self._usable)
        self._drop(useless)
        dropped = {id(record) for record in useless}
        for ledger in self.ledgers:
            for record in ledger.records.values():
                if record.state == "pending" and id(record) not in dropped:
                    self.credits.release(record.sample)

    # ---- helpers ----

    def _ledger_of(self, sample: SampleId) -> Ledger:
        return self.heldout if sample.epoch == HELDOUT_EPOCH else self.ledger

    def _geometry(self, record: Record) -> SampleGeometry:
        """How a sample is to be split: for the group that has formed its step, or for those to come."""
        return self._formed_geometry if record.step else self.geometry

    def _usable(self, ref: SampleRef) -> bool:
        return ref.sharding == self.geometry.sharding

    def _settle(self, ledger: Ledger, failed: Iterable[Record]) -> None:
        """Report those that were rejected for good, and let the others go on."""
        for record in failed:
            if record.state == "rejected":
                rejection = ledger.rejected[record.position]
                self.credits.release(record.sample)
                self._rejections.write(self._journal_rejection(rejection))
                self._observer.rejected(record.sample, self.prompts.name(record.sample), rejection.reason)
        self._changed()

    def _drop(self, records: Iterable[Record], then: Callable[[], None] = lambda: None) -> None:
        """Remove the samples' objects, then give back their credits.

        A sample that has been leased again meanwhile, under another key, needs its credits.
        """
        keys = [(record, record.key) for record in records]

        def gone() -> None:
            for record, key in keys:
                if record.key == key:
                    self.credits.release(record.sample)
            try:
                then()
            finally:
                self._changed()

        self._objects.remove_soon([key for _, key in keys], gone)

    def _saved(self) -> str | None:
        return None if self.checkpoint is None else (self.checkpoint / LEDGER_FILE).read_text()

    def _tell(self, damage: Damage) -> None:
        self._observer.note(str(damage))

    def _journal_rejection(self, rejection: Rejection) -> dict[str, Any]:
        name = self.prompts.name(rejection.sample)
        line = {"id": name, "sample": list(rejection.sample), "reason": rejection.reason}
        self._journal.write({"event": "rejected", **line})
        return line
