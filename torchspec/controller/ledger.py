"""The ledger: which state every sample of a run is in, and which step consumes it.

All samples of a run stand in one order: epoch 0 as the seed shuffles it, then epoch 1, and so on. A *position* is a
place in it. Steps consume accepted positions strictly from the front, so batches depend on the seed alone, never on
which worker was quick. Leases are given in the same order, at most ``reorder_window`` positions ahead of the oldest
untrained one.

    pending -> leased -> stored -> assigned(step) -> trained(step) -> committed(checkpoint)
       ^---------|---------|----------|                          any of the first four -> rejected(reason)

Because consumption is in order, everything a checkpoint has committed is one number, the *cursor*, plus the rejected
positions: that is the whole snapshot, and a resume brings back exactly what the checkpoint had not committed.

A worker that dies says nothing of which of its samples killed it. They are tried once more in company; a sample that
has been in all but one of ``max_failures`` deaths is *suspect*, and leased to a worker that has nothing else: only a
death alone rejects it, so no sample is rejected for its neighbour's fault.

The class is plain Python without clocks, locks or I/O; the controller actor calls it from one event loop.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from torchspec.contracts import SampleId, SampleRef
from torchspec.controller.ledger_snapshot import LedgerShape, LedgerSnapshot, Rejection
from torchspec.data.order import epoch_order

State = Literal["pending", "leased", "stored", "assigned", "trained", "committed", "rejected"]
Moved = Callable[[SampleId, State, State, str], None]
"""Told of a sample, the state before and after, and why: the worker's name, the step's, what went wrong, or nothing."""


@dataclass(slots=True)
class Record:
    """A sample in the making: leased at least once, and neither committed nor rejected."""

    position: int
    sample: SampleId
    state: State = "pending"
    attempts: int = 0
    """Leases given out; makes the key of each unique."""
    failures: int = 0
    """Leases that came to nothing, for which the prompt itself may be to blame."""
    deaths: int = 0
    """Workers that died while they held it."""
    key: str = ""
    worker: str = ""
    ref: SampleRef | None = None
    step: int = 0
    """The step that consumes it, once assigned; kept when its object is lost and captured again."""


@dataclass(slots=True)
class Step:
    """Positions that one optimizer step consumes; ``end`` is the cursor once it is trained."""

    positions: list[int]
    end: int


@dataclass
class Ledger:
    """See the module's docstring. ``moved`` is told of every change of a state; it must not ask for another one."""

    shape: LedgerShape
    reorder_window: int
    max_failures: int
    """``controller.max_attempts``. Deaths of workers count apart from failures, up to the same number."""
    max_steps: int | None = None
    first_epoch: int = 0
    moved: Moved = lambda sample, before, state, why: None

    def __post_init__(self) -> None:
        self.end = self.shape.prompts * self.shape.epochs
        self.records: dict[int, Record] = {}
        self.rejected: dict[int, Rejection] = {}
        self.steps: dict[int, Step] = {}
        self.trained_step = self.committed_step = self._assign_step = 0
        self.committed_cursor = 0
        self._assign_cursor = 0  # first position not considered for a step
        self._frontier = 0  # first position never leased
        self._counts: Counter[str] = Counter(pending=self.end)
        self._by_sample: dict[SampleId, Record] = {}
        self._leases: defaultdict[str, set[int]] = defaultdict(set)  # by worker
        self._retries: list[int] = []  # sorted
        self._parked: list[int] = []  # wait until the store has room
        self.passed_over: set[int] = set()
        """Pending positions that are not leased for now, because later ones are answered first."""
        self._orders: dict[int, np.ndarray] = {}
        self._rejected_ahead = 0  # positions from the trained cursor on, which the window does not count

    # ---- the order of positions ----

    def sample_at(self, position: int) -> SampleId:
        epoch, row = divmod(position, self.shape.prompts)
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = epoch_order(self.shape.seed, epoch, self.shape.prompts)
        return SampleId(self.first_epoch + epoch, int(self._orders[epoch][row]))

    @property
    def trained_cursor(self) -> int:
        """Everything before it is trained or rejected."""
        return self._end_of(self.trained_step)

    # ---- pending -> leased -> stored ----

    def next_to_lease(self, of_steps_only: bool = False) -> Record | None:
        """The lowest position that needs a worker, or None inside a full window. Does not change any state.

        Args:
            of_steps_only: only what a step that has been formed waits for, because its object was lost.
        """
        if of_steps_only:
            return next((self.records[p] for p in self._retries if self.records[p].step), None)
        again = next((p for p in self._retries if p not in self.passed_over), None)
        if again is not None:
            return self.records[again]
        window_end = self.trained_cursor + self.reorder_window + self._rejected_ahead
        if self._parked or self._frontier >= min(self.end, window_end) or self.exhausted:
            return None
        return Record(self._frontier, self.sample_at(self._frontier))

    @property
    def window_full(self) -> bool:
        """Whether the reorder window alone keeps :meth:`next_to_lease` from the next position."""
        waiting = self._retries or self._parked or self.exhausted
        return not waiting and self.trained_cursor + self.reorder_window <= self._frontier < self.end

    def is_suspect(self, record: Record) -> bool:
        """Whether it may have killed workers, and is only leased to one that has nothing else."""
        return 0 < record.deaths >= self.max_failures - 1

    def lease(self, record: Record, worker: str, key_prefix: str) -> Record:
        """Hand ``record`` (from :meth:`next_to_lease`) to ``worker`` under a key that no earlier lease used."""
        if record.position in self.records:
            self._retries.remove(record.position)
        else:
            assert record.position == self._frontier
            self._frontier += 1
            self.records[record.position] = self._by_sample[record.sample] = record
        record.attempts += 1
        record.worker, record.key = worker, f"{key_prefix}/{record.sample}a{record.attempts}"
        self._move(record, "leased", worker)
        return record

    def leased_to(self, worker: str) -> list[Record]:
        """What ``worker`` holds."""
        return [self.records[p] for p in self._leases.get(worker, ())]

    def store(self, record: Record, ref: SampleRef) -> None:
        """A worker has put the sample of its lease."""
        assert record.state == "leased" and record.key == ref.key
        record.ref, record.deaths = ref, 0
        self._move(record, "assigned" if record.step else "stored")  # it had its step when its object was lost

    def put_back(self, record: Record, why: str = "") -> None:
        """Back to pending, and held against nobody: its lease came to nothing, or its object is lost."""
        self._move(record, "pending", why)
        insort(self._retries, record.position)

    def fail(self, record: Record, reason: str, final: bool = False) -> None:
        """A lease came to nothing: back to pending, or rejected if that is ``final`` or has happened ``max_failures``
        times."""
        record.failures += 1
        if final or record.failures >= self.max_failures:
            self._reject(record, reason)
        else:
            self.put_back(record, reason)

    def defer(self, record: Record) -> str | None:
        """The store had no hole large enough for a leased sample, which is nobody's fault.

        The stored sample furthest behind it gives up its place, so that the front of the order always gets through;
        returns the key of its object, which the caller removes. Without one the sample waits for :meth:`unpark`.
        """
        victim = self.furthest_behind(record.position, lambda r: r.state == "stored")
        if victim is not None:
            self.put_back(record)
        parked = victim or record
        self._move(parked, "pending")
        self._parked.append(parked.position)
        return None if victim is None else victim.key

    def unpark(self) -> None:
        """Objects have been freed: what waited for room in the store may try again."""
        self._retries = sorted(self._retries + self._parked)
        self._parked.clear()

    def worker_lost(self, worker: str, alone: bool) -> list[Record]:
        """Every lease of a dead worker goes back to pending; returns their samples.

        Args:
            alone: the worker had one lease and no other; it is rejected if that was once too often.
        """
        lost = self.leased_to(worker)
        for record in lost:
            record.deaths += 1
            if alone and record.deaths >= self.max_failures:
                self._reject(record, f"{record.deaths} workers died with it, the last one, {worker}, alone")
            else:
                self.put_back(record, f"{worker} died")
        return lost

    def forget_objects(self, keep: Callable[[SampleRef], bool]) -> list[Record]:
        """Stored samples that ``keep`` does not want go back to pending, but for those of steps that are formed.

        Returns them; ``key`` names the objects that are of no use now.
        """
        dropped = [r for r in self.records.values() if r.state == "stored" and r.ref and not keep(r.ref)]
        for record in dropped:
            self.put_back(record)
        return dropped

    def furthest_behind(self, position: int, wanted: Callable[[Record], bool]) -> Record | None:
        """The last sample behind ``position`` that is ``wanted``."""
        behind = (r for r in self.records.values() if r.position > position and wanted(r))
        return max(behind, key=lambda r: r.position, default=None)

    def _reject(self, record: Record, reason: str) -> None:
        self.rejected[record.position] = Rejection(record.sample, f"{reason} (attempt {record.attempts})")
        self._rejected_ahead += 1
        if record.step:
            self.steps[record.step].positions.remove(record.position)
        self._move(record, "rejected", reason)

    # ---- stored -> assigned -> trained -> committed ----

    def assign(self) -> int | None:
        """Form the next step if its samples are all stored; its number, or None.

        A step holds ``batch_size`` accepted positions, fewer only at the very end of the order.
        """
        if self.exhausted:
            return None
        chosen: list[int] = []
        cursor = self._assign_cursor
        while len(chosen) < self.shape.batch_size and cursor < self.end:
            if cursor not in self.rejected:
                record = self.records.get(cursor)
                if record is None or record.state != "stored":
                    return None
                chosen.append(cursor)
            cursor += 1
        self._assign_step += 1
        self._assign_cursor = cursor
        self.steps[self._assign_step] = Step(chosen, cursor)
        for position in chosen:
            self.records[position].step = self._assign_step
            self._move(self.records[position], "assigned", f"step {self._assign_step}")
        return self._assign_step

    def step_records(self, step: int) -> list[Record]:
        return [self.records[p] for p in self.steps[step].positions]

    def train(self, step: int) -> None:
        """The optimizer has made ``step``. Steps end in order."""
        assert step == self.trained_step + 1, f"step {step} ended after step {self.trained_step}"
        for record in self.step_records(step):
            assert record.state == "assigned"
            self._move(record, "trained")
        passed = range(self.trained_cursor, self.steps[step].end)
        self._rejected_ahead -= sum(position in self.rejected for position in passed)
        self.trained_step = step

    def commit(self, step: int) -> None:
        """A checkpoint taken after ``step`` is safely in place."""
        assert self.committed_step <= step <= self.trained_step
        self.committed_step, self.committed_cursor = step, self._end_of(step)
        for done in [s for s in self.steps if s <= step]:
            for position in self.steps.pop(done).positions:
                self._move(self.records[position], "committed")

    # ---- questions ----

    def leased(self, sample: SampleId, key: str) -> Record | None:
        """The sample's record, if ``key`` is that of its present lease."""
        record = self._by_sample.get(sample)
        return record if record is not None and record.state == "leased" and record.key == key else None

    def is_stored(self, sample: SampleId, key: str) -> bool:
        """Whether the sample is in use under ``key``: stored, or further on its way."""
        record = self._by_sample.get(sample)
        return record is not None and record.key == key and record.state not in ("pending", "leased")

    def is_leased(self, sample: SampleId) -> bool:
        return sample in self._by_sample and self._by_sample[sample].state == "leased"

    def is_last(self, step: int) -> bool:
        """Whether no step can follow ``step``, as far as is known now."""
        return self._is_over(step, self.steps[step].end)

    @property
    def exhausted(self) -> bool:
        """Every sample has been assigned or rejected: no further step will form."""
        return self._is_over(self._assign_step, self._assign_cursor)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run if nothing more is rejected."""
        accepted = self.end - len(self.rejected)
        steps = -(-accepted // self.shape.batch_size)
        return min(steps, self.max_steps) if self.max_steps is not None else steps

    def counts(self) -> dict[str, int]:
        """State to number of samples; sums to prompts x epochs."""
        return {state: self._counts[state] for state in get_args(State)}

    def ready(self) -> int:
        """Stored samples that stand in order at the front, ready for the next steps."""
        ready, cursor = 0, self._assign_cursor
        while cursor in self.rejected or (cursor in self.records and self.records[cursor].state == "stored"):
            ready += cursor not in self.rejected
            cursor += 1
        return ready

    def stored_bytes(self) -> int:
        """Bytes of the samples that lie in the store now."""
        return sum(r.ref.num_bytes for r in self.records.values() if r.ref and r.state in ("stored", "assigned"))

    # ---- checkpoints ----

    def snapshot(self, step: int) -> str:
        """The ledger as a checkpoint after ``step`` keeps it, as JSON."""
        cursor = self._end_of(step)
        rejected = tuple((p, r) for p, r in sorted(self.rejected.items()) if p < cursor)
        return LedgerSnapshot(self.shape, step, cursor, rejected).to_json()

    def rewind(self, text: str | None, keep: Callable[[SampleRef], bool] = lambda _: True) -> list[Record]:
        """Go to where a checkpoint was taken, back or (when nobody had told of it) ahead; None: to the beginning.

        Later steps are undone: what they trained is pending again, what is stored stays so if ``keep`` wants it, and
        what was rejected stays rejected.

        Returns:
            The samples whose objects are of no use any more, by their ``key``. Those of trained ones are gone anyway.

        Raises:
            ValueError: the snapshot is of other data, another seed or another batch size, or from before a commit:
                what was committed since is forgotten, and could only be trained twice.
        """
        saved = LedgerSnapshot(self.shape) if text is None else LedgerSnapshot.from_json(text, self.shape)
        if saved.step < self.committed_step:
            raise ValueError(f"a checkpoint of step {saved.step} cannot follow that of step {self.committed_step}")
        later = {p: r for p, r in self.rejected.items() if p >= saved.cursor}
        self.rejected, self._rejected_ahead = dict(saved.rejected) | later, len(later)
        self.committed_step = self.trained_step = self._assign_step = saved.step
        self.committed_cursor = self._assign_cursor = saved.cursor
        self._frontier = max(self._frontier, saved.cursor)
        self.steps.clear()
        done = [r for p, r in self.records.items() if p < saved.cursor]
        for record in done:
            self._move(record, "committed")
        useless = []
        for record in self.records.values():
            record.step = 0
            unwanted = record.ref is not None and record.state != "trained" and not keep(record.ref)
            if unwanted:
                useless.append(record)
            if unwanted or record.state == "trained":
                self._move(record, "pending")
            elif record.state == "assigned":
                self._move(record, "stored")
        self._parked.clear()
        self._retries = sorted(p for p, r in self.records.items() if r.state == "pending")
        self._counts = Counter(r.state for r in self.records.values())
        self._counts.update(rejected=len(self.rejected), committed=saved.cursor - len(saved.rejected))
        self._counts["pending"] += self.end - self._counts.total()
        return done + useless

    # ---- helpers ----

    def _move(self, record: Record, state: State, why: str = "") -> None:
        """The one door to another state. Counts and leases are kept here, and who listens is told."""
        before, record.state = record.state, state
        self._counts[before] -= 1
        self._counts[state] += 1
        if before == "leased":
            self._leases[record.worker].remove(record.position)
            if not self._leases[record.worker]:
                del self._leases[record.worker]
        if state == "leased":
            self._leases[record.worker].add(record.position)
        elif state == "pending":
            record.ref = None
        elif state in ("committed", "rejected"):
            del self._by_sample[record.sample], self.records[record.position]
        self.moved(record.sample, before, state, why)

    def _is_over(self, step: int, cursor: int) -> bool:
        if self.max_steps is not None and step >= self.max_steps:
            return True
        return all(p in self.rejected for p in range(cursor, self.end))

    def _end_of(self, step: int) -> int:
        return self.steps[step].end if step in self.steps else self.committed_cursor
