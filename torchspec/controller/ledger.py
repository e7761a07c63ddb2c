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

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import get_args

from torchspec.contracts import SampleId, SampleRef
from torchspec.controller.ledger_snapshot import LedgerShape, LedgerSnapshot, Rejection
from torchspec.controller.records import IN_STORE, Moved, Record, State, Step
from torchspec.data.order import epoch_order

_epoch_order = lru_cache(maxsize=4)(epoch_order)


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
        self._ready_end = 0  # first position from there on that is neither stored nor rejected
        self._frontier = 0  # first position never leased
        self.stored_bytes = 0
        """Of the samples that lie in the store now."""
        self._counts: Counter[str] = Counter(pending=self.end)
        self._by_sample: dict[SampleId, Record] = {}
        self._leases: defaultdict[str, set[int]] = defaultdict(set)  # by worker
        self._stored: list[int] = []  # sorted
        self._retries: list[int] = []  # a heap: pending again
        self._parked: list[int] = []  # pending, wait until the store has room
        self._passed_over: set[int] = set()  # pending, later ones are answered first
        self._rejected_ahead = 0  # positions from the trained cursor on, which the window does not count
        self._accepted_ahead = self.end  # positions from the assign cursor on that are not rejected

    # ---- the order of positions ----

    def sample_at(self, position: int) -> SampleId:
        epoch, row = divmod(position, self.shape.prompts)
        order = _epoch_order(self.shape.seed, epoch, self.shape.prompts)
        return SampleId(self.first_epoch + epoch, int(order[row]))

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
        if self._retries:
            again = self.records[self._retries[0]]
            return again if again.step or not of_steps_only else None  # those of steps come first
        window_end = self.trained_cursor + self.reorder_window + self._rejected_ahead
        if of_steps_only or self._parked or self._frontier >= min(self.end, window_end) or self.exhausted:
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
            first = heappop(self._retries)
            assert first == record.position
        else:
            assert record.position == self._frontier
            self._frontier += 1
            self.records[record.position] = self._by_sample[record.sample] = record
        record.attempts += 1
        record.worker, record.key = worker, f"{key_prefix}/{record.sample}a{record.attempts}"
        self._move(record, "leased", worker)
        return record

    def leased_to(self, worker: str) -> list[Record]:
        return [self.records[p] for p in self._leases.get(worker, ())]

    def store(self, record: Record, ref: SampleRef) -> None:
        """A worker has put the sample of its lease."""
        assert record.state == "leased" and record.key == ref.key
        record.ref, record.deaths = ref, 0
        self._move(record, "assigned" if record.step else "stored")  # it had its step when its object was lost

    def put_back(self, record: Record, why: str = "") -> None:
        """Back to pending, and held against nobody: its lease came to nothing, or its object is lost."""
        self._move(record, "pending", why)
        heappush(self._retries, record.position)

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
        displaced = bool(self._stored) and self._stored[-1] > record.position
        parked = self.records[self._stored[-1]] if displaced else record
        if displaced:
            self.put_back(record)
        self._move(parked, "pending")
        self._parked.append(parked.position)
        return parked.key if displaced else None

    def unpark(self) -> None:
        """Objects have been freed: what waited for room in the store may try again."""
        while self._parked:
            heappush(self._retries, self._parked.pop())

    def pass_over(self, record: Record) -> None:
        """Back to pending, and not leased before :meth:`take_up`, because later ones are answered first."""
        self._move(record, "pending")
        self._passed_over.add(record.position)

    def take_up(self) -> None:
        while self._passed_over:
            heappush(self._retries, self._passed_over.pop())

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
        dropped = [r for r in map(self.records.__getitem__, self._stored) if r.ref and not keep(r.ref)]
        for record in dropped:
            self.put_back(record)
        return dropped

    def furthest_behind(self, position: int, samples: Iterable[SampleId]) -> Record | None:
        """The last of ``samples`` behind ``position`` that is stored or pending."""
        known = (self._by_sample[sample] for sample in samples if sample in self._by_sample)
        behind = (r for r in known if r.position > position and r.state in ("stored", "pending"))
        return max(behind, key=lambda r: r.position, default=None)

    def _reject(self, record: Record, reason: str) -> None:
        self.rejected[record.position] = Rejection(record.sample, f"{reason} (attempt {record.attempts})")
        self._rejected_ahead += 1
        self._accepted_ahead -= record.position >= self._assign_cursor
        if record.step:
            self.steps[record.step].positions.remove(record.position)
        self._move(record, "rejected", reason)

    # ---- stored -> assigned -> trained -> committed ----

    def assign(self) -> int | None:
        """Form the next step if its samples are all stored; its number, or None.

        A step holds ``batch_size`` accepted positions, fewer only at the very end of the order.
        """
        full = self.ready() >= self.shape.batch_size
        if self.exhausted or not (full or self._ready_end == self.end):
            return None
        chosen = self._stored[: self.shape.batch_size]
        cursor = chosen[-1] + 1 if full else self.end
        self._assign_step += 1
        self._assign_cursor = cursor
        self._accepted_ahead -= len(chosen)
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
        return step == self._assign_step and self.exhausted

    @property
    def exhausted(self) -> bool:
        """Every sample has been assigned or rejected: no further step will form."""
        at_limit = self.max_steps is not None and self._assign_step >= self.max_steps
        return at_limit or self._accepted_ahead == 0

    def counts(self) -> dict[str, int]:
        """State to number of samples; sums to prompts x epochs."""
        return {state: self._counts[state] for state in get_args(State)}

    def ready(self) -> int:
        """Stored samples that stand in order at the front, ready for the next steps."""
        return bisect_left(self._stored, self._ready_end)

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
        self._accepted_ahead = self.end - saved.cursor - len(later)
        self.committed_step = self.trained_step = self._assign_step = saved.step
        self.committed_cursor = self._assign_cursor = self._ready_end = saved.cursor
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
        self._extend_ready()
        self._parked.clear()
        pending = (p for p, r in self.records.items() if r.state == "pending")
        self._retries = sorted(p for p in pending if p not in self._passed_over)
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
        position, size = record.position, 0 if record.ref is None else record.ref.num_bytes
        self.stored_bytes += size * ((state in IN_STORE) - (before in IN_STORE))
        if before == "leased":
            self._leases[record.worker].remove(position)
            if not self._leases[record.worker]:
                del self._leases[record.worker]
        elif before == "stored":
            del self._stored[bisect_left(self._stored, position)]
        if state == "leased":
            self._leases[record.worker].add(position)
        elif state == "stored":
            insort(self._stored, position)
        elif state == "pending":
            record.ref = None
            if self._assign_cursor <= position < self._ready_end:
                self._ready_end = position
        elif state in ("committed", "rejected"):
            del self._by_sample[record.sample], self.records[position]
        if position == self._ready_end:
            self._extend_ready()
        self.moved(record.sample, before, state, why)

    def _extend_ready(self) -> None:
        """Pass what is stored or rejected: for each position once, and again only after it was captured again."""
        end = self._ready_end
        while end in self.rejected or ((record := self.records.get(end)) is not None and record.state == "stored"):
            end += 1
        self._ready_end = end

    def _end_of(self, step: int) -> int:
        return self.steps[step].end if step in self.steps else self.committed_cursor
