"""The buffer of a run: which state each sample is in, what room it holds in the store, and what has been written down.

Whatever happens to a sample - stored, lost, rejected, trained, undone - is entered here, together with what follows
from it: objects are removed, credits given back, rejections and resumes journalled. Who waits for a change (workers for
leases, ranks for steps) is told by ``changed``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from torchspec.config.schema import Config
from torchspec.contracts import HELDOUT_EPOCH, SampleId, SampleRef
from torchspec.controller.credits import Credits
from torchspec.controller.journal import count_events
from torchspec.controller.ledger import Ledger, Record
from torchspec.controller.ledger_snapshot import LedgerShape, Rejection, ledger_shape
from torchspec.controller.objects import StoredObjects
from torchspec.controller.prompts import Prompts
from torchspec.controller.spec import ControllerSpec
from torchspec.controller.sync import Signal
from torchspec.controller.token_counts import TokenCounts
from torchspec.files import JsonLines
from torchspec.monitor.record.observer import Observer
from torchspec.run_folder import LEDGER_FILE, RunFolder
from torchspec.shards import ShardFormula


class SampleBuffer:
    """See the module's docstring.

    Args:
        changed: told after every change that somebody may wait for.
    """

    def __init__(self, spec: ControllerSpec, changed: Callable[[], None]):
        config, run_dir = spec.config, spec.run_dir
        self._run_dir, self._run, self._changed = run_dir, config.run.name, changed
        window, attempts = config.controller.reorder_window, config.controller.max_attempts
        self.ledger = Ledger(ledger_shape(config, spec.train), window, attempts, config.training.max_steps)
        heldout = len(spec.heldout) if spec.heldout else 0
        shape = LedgerShape(
            spec.heldout.content_hash if spec.heldout else "", heldout, 1, max(1, heldout), config.run.seed
        )
        self.heldout = Ledger(shape, max(1, heldout), attempts, first_epoch=HELDOUT_EPOCH)
        self.journal = JsonLines(run_dir / "ledger.jsonl")
        self.rejections = JsonLines(run_dir / "rejected.jsonl")
        self.observer = Observer(run_dir, config.monitor.history_seconds)
        self.samples = Prompts(
            spec.train, spec.heldout, run_dir / "answers.jsonl", config.answer.reuse, config.run.seed
        )
        self.credits = Credits(spec.credit_bytes)
        self.objects = StoredObjects(spec.endpoint)
        self.geometry = spec.geometry
        """Of the samples that are leased from now on, but for those of steps that are formed."""
        self.formed_sharding: ShardFormula | None = spec.geometry.sharding
        """How samples of formed steps are split: as the present group of ranks reads them."""
        first = range(min(config.draft.vocab_prompts, len(spec.train)))
        self.vocabulary = TokenCounts(
            run_dir / "draft_vocab.json",
            spec.train,
            [self.ledger.sample_at(p) for p in first],
            config.draft.vocab_size,
            spec.vocab_size,
            spec.end_token_ids,
            config.data.cache_dir,
        )
        self.counted = Signal()
        """Fires when there is a vocabulary."""
        self.generation = 0
        """Of the training group; counted through the run."""
        self.key_prefix = ""
        """Of this controller's keys; no other one of the run has the same."""

    @property
    def ledgers(self) -> tuple[Ledger, Ledger]:
        """Held-out samples come first."""
        return self.heldout, self.ledger

    def of(self, sample: SampleId) -> Ledger:
        """The ledger that ``sample`` is in."""
        return self.heldout if sample.epoch == HELDOUT_EPOCH else self.ledger

    # ---- opening ----

    async def open(self, config: Config) -> None:
        """Take up the run where its newest checkpoint is.

        Raises:
            ValueError: the checkpoint is of other data, another seed or another batch size.
        """
        self.geometry = replace(self.geometry, sharding=config.training.shard_formula)
        events = count_events(self._run_dir / "ledger.jsonl")
        incarnation, self.generation = events["started"] + 1, events["group"]
        self.key_prefix = f"{self._run}/{incarnation}"
        self.ledger.rewind(self._newest_snapshot())
        line = {name: getattr(self.ledger.shape, name) for name in LedgerShape.__dataclass_fields__}
        limits = {"max_steps": config.training.max_steps, "reorder_window": config.controller.reorder_window}
        self.journal.write({"event": "started", **line, **limits})
        if incarnation > 1:
            self.journal.write({"event": "resumed", "step": self.ledger.committed_step})
            self.observer.resumed(self.ledger.committed_step)
        await self.objects.connect(self.geometry.suffixes)
        if incarnation > 1:
            await self.objects.remove_all(f"{self._run}/")
        self.count_vocabulary()

    async def removed(self) -> None:
        """All that is of no use any more has left the store."""
        await self.objects.close()

    def close(self) -> None:
        for file in (self.journal, self.rejections, self.observer):
            file.close()

    # ---- how samples are split ----

    def sharding(self, record: Record) -> ShardFormula | None:
        """How a sample is to be split: for the group that has formed its step, or for those to come."""
        return self.formed_sharding if record.step else self.geometry.sharding

    def split(self, sharding: ShardFormula | None) -> None:
        """From now on, store samples split like this; those that are stored otherwise are captured again."""
        if sharding == self.geometry.sharding:
            return
        self.geometry = replace(self.geometry, sharding=sharding)
        self.objects.also(self.geometry.suffixes)
        self.forget(self._usable)

    def _usable(self, ref: SampleRef) -> bool:
        return ref.sharding == self.geometry.sharding

    # ---- a sample's way ----

    def settle(self, ledger: Ledger, samples: Collection[SampleId]) -> None:
        """After failures: report what was rejected for good, and let the others go on."""
        for rejection in [r for r in ledger.rejected.values() if r.sample in samples] if samples else ():
            self.credits.release(rejection.sample)
            self.rejections.write(self._journal_rejection(rejection))
            self.observer.rejected(rejection.sample, self.samples.name(rejection.sample), rejection.reason)
        self.count_vocabulary()
        self._changed()

    def formed(self, step: int) -> None:
        """A group of ranks has formed ``step``."""
        self.observer.mark(self.ledger.step_records(step), "assigned", f"step {step}")

    def lose(self, ledger: Ledger, step: int, samples: set[SampleId]) -> None:
        """The store has lost samples of a formed step: they are captured again."""
        keys = []
        for record in [r for r in ledger.step_records(step) if r.sample in samples]:
            self.observer.sample_lost(record, self.samples.name(record.sample))
            keys.append(record.key)
            ledger.lose(record.sample, record.key)
        self.objects.remove_soon(keys)  # they may only have been out of reach
        self.settle(ledger, samples)

    def forget(self, keep: Callable[[SampleRef], bool]) -> None:
        """Capture again what is stored and ``keep`` does not want, but for what formed steps need."""
        for ledger in self.ledgers:
            self.drop(ledger.forget_objects(keep))

    def train(self, step: int) -> None:
        """All ranks have made ``step``."""
        records = self.ledger.step_records(step)
        self.ledger.train(step)
        batch = {"step": step, "end": self.ledger.trained_cursor, "samples": [r.sample for r in records]}
        self.journal.write({"event": "trained", **batch})
        self.observer.trained(records)

        def freed() -> None:
            self.room()
            for record in records:
                self.observer.freed(record, self.samples)

        self.drop(records, freed)
        self._changed()

    def hold_heldout(self) -> None:
        """All ranks have the held-out samples in their memory."""
        if not self.heldout.trained_step:
            records = self.heldout.step_records(1)
            self.heldout.train(1)
            self.drop(records, self.room)

    def drop(self, records: Iterable[Record], then: Callable[[], None] = lambda: None) -> None:
        """Remove the samples' objects, then give back their credits: never the other way round.

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

        self.objects.remove_soon([key for _, key in keys], gone)

    def room(self) -> None:
        """What waits for room in the store may try again."""
        for ledger in self.ledgers:
            ledger.room()

    def count_vocabulary(self) -> None:
        """Count what answers there are, until there are enough."""
        if self.vocabulary.vocab is not None:
            return
        rejected = {r.sample for r in self.ledger.rejected.values()}
        if self.vocabulary.update(self.samples.answer, rejected):
            self.counted.fire()

    # ---- going back ----

    def rewind(self) -> None:
        """Go to the newest checkpoint: what the ranks that have ended did after it is undone."""
        known, trained = self.ledger.committed_step, self.ledger.trained_step
        useless = self.ledger.rewind(self._newest_snapshot(), self._usable)
        step = self.ledger.committed_step
        if step > known:  # its rank died before it could tell
            self.journal.write({"event": "committed", "step": step})
        if step < trained:
            self.journal.write({"event": "resumed", "step": step})
            self.observer.note(f"going back to step {step}: {trained - step} steps are made again", step=step)
            for position, rejection in sorted(self.ledger.rejected.items()):
                if position >= self.ledger.committed_cursor:
                    self._journal_rejection(rejection)
        useless += self.heldout.rewind(None, self._usable)
        self.drop(useless)
        dropped = {id(record) for record in useless}
        for ledger in self.ledgers:
            for record in ledger.records.values():
                if record.state == "pending" and id(record) not in dropped:
                    self.credits.release(record.sample)

    def _newest_snapshot(self) -> str | None:
        folder = RunFolder(self._run_dir).newest_checkpoint()
        return None if folder is None else (folder / LEDGER_FILE).read_text()

    def _journal_rejection(self, rejection: Rejection) -> dict[str, Any]:
        name = self.samples.name(rejection.sample)
        line = {"id": name, "sample": list(rejection.sample), "reason": rejection.reason}
        self.journal.write({"event": "rejected", **line})
        return line
