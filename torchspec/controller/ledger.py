"""The ledger: which state every sample of a run is in, and which step consumes it.

All samples of a run stand in one line: epoch 0 in its seeded order, then epoch 1, and so on. A *position* is a place in
that line. Steps consume accepted positions strictly from the front, so batches depend on the seed alone, never on
which worker was quick. Leases are given in the same order, at most ``reorder_window`` positions ahead of the oldest
untrained one.

    pending -> leased -> stored -> assigned(step) -> trained(step) -> committed(checkpoint)
       ^---------|---------|----------|                          any of the first four -> rejected(reason)

Because consumption is in order, everything a checkpoint has committed is one number, the *cursor*, plus the rejected
positions: that is the whole snapshot, and a resume brings back exactly what the checkpoint had not committed.

The class is plain Python without clocks, locks or I/O; the controller actor calls it from one event loop.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from torchspec.contracts import SampleId, SampleRef
from torchspec.data.order import epoch_order

State = Literal["pending", "leased", "stored", "assigned", "trained"]
SNAPSHOT_VERSION = 1


@dataclass(slots=True)
class Record:
    """A sample in the making: leased at least once and not yet committed."""

    position: int
    sample: SampleId
    state: State = "pending"
    attempts: int = 0
    """Leases given out; makes each attempt's key unique."""
    failures: int = 0
    """Attempts that the prompt itself may be to blame for."""
    key: str = ""
    worker: str = ""
    ref: SampleRef | None = None
    step: int = 0
    """The step that consumes it, once assigned; kept when its object is lost and captured again."""


@dataclass(frozen=True, slots=True)
class Rejection:
    sample: SampleId
    reason: str


@dataclass(frozen=True, slots=True)
class LedgerShape:
    """What the line of positions is made of. Two ledgers with equal shapes have equal batches."""

    dataset: str
    """Content hash of the prompt set."""
    prompts: int
    epochs: int
    batch_size: int
    seed: int


@dataclass(slots=True)
class Step:
    """Positions that one optimizer step consumes; ``end`` is the cursor once it is trained."""

    positions: list[int]
    end: int


@dataclass
class Ledger:
    shape: LedgerShape
    reorder_window: int
    max_attempts: int
    max_steps: int | None = None
    first_epoch: int = 0
    rejected: dict[int, Rejection] = field(default_factory=dict)
    committed_step: int = 0
    committed_cursor: int = 0

    def __post_init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.steps: dict[int, Step] = {}
        self.trained_step = self.committed_step
        self._positions: dict[SampleId, int] = {}
        self._retries: list[int] = []
        self._parked: list[int] = []  # wait until the store has room
        self._frontier = self.committed_cursor  # first position never leased
        self._assign_cursor = self.committed_cursor  # first position not considered for a step
        self._assign_step = self.committed_step
        self._orders: dict[int, Any] = {}
        self._rejected_ahead = 0  # positions from the trained cursor on; they take no room in the window

    # ---- the line of positions ----

    @property
    def end(self) -> int:
        return self.shape.prompts * self.shape.epochs

    def sample_at(self, position: int) -> SampleId:
        epoch, row = divmod(position, self.shape.prompts)
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = epoch_order(self.shape.seed, epoch, self.shape.prompts)
        return SampleId(self.first_epoch + epoch, int(self._orders[epoch][row]))

    @property
    def trained_cursor(self) -> int:
        """Everything before it is trained or rejected."""
        return self.steps[self.trained_step].end if self.trained_step in self.steps else self.committed_cursor

    # ---- pending -> leased -> stored ----

    def next_to_lease(self) -> Record | None:
        """The lowest position that needs a worker, or None inside a full window. Does not change any state."""
        if self._retries:
            return self.records[self._retries[0]]
        if self._parked:
            return None
        window_end = self.trained_cursor + self.reorder_window + self._rejected_ahead
        if self._frontier >= min(self.end, window_end) or self._all_steps_assigned():
            return None
        return Record(self._frontier, self.sample_at(self._frontier))

    def lease(self, record: Record, worker: str, key_prefix: str) -> Record:
        """Hand ``record`` (from :meth:`next_to_lease`) to ``worker`` under a key that no earlier attempt used."""
        if self._retries and self._retries[0] == record.position:
            heapq.heappop(self._retries)
        else:
            assert record.position == self._frontier
            self._frontier += 1
            self.records[record.position] = record
            self._positions[record.sample] = record.position
        record.attempts += 1
        record.state, record.worker = "leased", worker
        record.key = f"{key_prefix}/{record.sample}a{record.attempts}"
        return record

    def store(self, ref: SampleRef) -> Record | None:
        """A worker has put the sample. None when that attempt is no longer the current one: its object is garbage."""
        record = self._leased(ref.sample, ref.key)
        if record is None:
            return None
        record.state, record.ref = "stored", ref
        if record.step:  # it was part of a step when its object was lost
            record.state = "assigned"
        return record

    def fail(self, sample: SampleId, key: str, reason: str, final: bool = False) -> Record | None:
        """A lease came to nothing: back to pending, or rejected if that is ``final`` or has happened ``max_attempts``
        times. None for an outdated key."""
        record = self._leased(sample, key)
        if record is not None:
            self._blame(record, reason, final)
        return record

    def defer(self, sample: SampleId, key: str, reason: str) -> str | None:
        """The store had no hole large enough for a sample, which is nobody's fault.

        The stored sample furthest behind it gives up its place, so that the front of the line always gets through;
        returns the key of its object, which the caller removes. Without one the sample waits for :meth:`room`.
        """
        record = self._leased(sample, key)
        if record is None:
            return None
        stored = [r for r in self.records.values() if r.state in ("stored", "assigned")]
        behind = [r for r in stored if r.state == "stored" and r.position > record.position]
        if not stored:  # even an empty store is too small
            self._blame(record, reason, False)
            return None
        if not behind:
            record.state = "pending"
            self._parked.append(record.position)
            return None
        victim = max(behind, key=lambda r: r.position)
        self._return(record)
        victim.state, victim.ref = "pending", None
        self._parked.append(victim.position)
        return victim.key

    def room(self) -> None:
        """Objects have been freed: what waited for room may try again."""
        for position in self._parked:
            heapq.heappush(self._retries, position)
        self._parked.clear()

    def lose(self, sample: SampleId, key: str) -> Record | None:
        """A stored object is missing or corrupt: its sample goes back to pending (and keeps its step)."""
        record = self._find(sample)
        if record is None or record.key != key or record.state not in ("stored", "assigned"):
            return None
        record.ref = None
        self._return(record)
        return record

    def worker_lost(self, worker: str) -> list[Record]:
        """Every lease of a dead worker goes back to pending."""
        lost = [r for r in self.records.values() if r.state == "leased" and r.worker == worker]
        for record in lost:
            self._blame(record, f"worker {worker} died", False)
        return lost

    def _return(self, record: Record) -> None:
        record.state = "pending"
        heapq.heappush(self._retries, record.position)

    def _blame(self, record: Record, reason: str, final: bool) -> None:
        record.failures += 1
        if not final and record.failures < self.max_attempts:
            self._return(record)
            return
        self.rejected[record.position] = Rejection(record.sample, f"{reason} (attempt {record.attempts})")
        self._rejected_ahead += 1
        self._forget(record.position)
        if record.step:
            self.steps[record.step].positions.remove(record.position)

    # ---- stored -> assigned -> trained -> committed ----

    def assign(self) -> int | None:
        """Form the next step if its samples are all stored; its number, or None.

        A step holds ``batch_size`` accepted positions, fewer only at the very end of the line.
        """
        if self._all_steps_assigned():
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
        if not chosen:
            self._assign_cursor = cursor
            return None
        self._assign_step += 1
        self._assign_cursor = cursor
        self.steps[self._assign_step] = Step(chosen, cursor)
        for position in chosen:
            record = self.records[position]
            record.state, record.step = "assigned", self._assign_step
        return self._assign_step

    def step_records(self, step: int) -> list[Record]:
        return [self.records[p] for p in self.steps[step].positions]

    def train(self, step: int) -> None:
        """The optimizer has made ``step``. Steps end in order."""
        assert step == self.trained_step + 1, f"step {step} ended after step {self.trained_step}"
        for record in self.step_records(step):
            assert record.state == "assigned"
            record.state = "trained"
        passed = range(self.trained_cursor, self.steps[step].end)
        self._rejected_ahead -= sum(position in self.rejected for position in passed)
        self.trained_step = step

    def commit(self, step: int) -> None:
        """A checkpoint taken after ``step`` is safely in place."""
        assert self.committed_step <= step <= self.trained_step
        self.committed_cursor = self.steps[step].end if step in self.steps else self.committed_cursor
        self.committed_step = step
        for done in [s for s in self.steps if s <= step]:
            for position in self.steps.pop(done).positions:
                self._forget(position)

    # ---- questions ----

    def is_leased(self, sample: SampleId) -> bool:
        record = self._find(sample)
        return record is not None and record.state == "leased"

    def is_last(self, step: int) -> bool:
        """Whether no step can follow ``step``, as far as is known now."""
        if self.max_steps is not None and step >= self.max_steps:
            return True
        return all(p in self.rejected for p in range(self.steps[step].end, self.end))

    @property
    def exhausted(self) -> bool:
        """Every sample has been assigned or rejected: no further step will form."""
        return self._all_steps_assigned() or all(p in self.rejected for p in range(self._assign_cursor, self.end))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run if nothing more is rejected."""
        accepted = self.end - len(self.rejected)
        steps = -(-accepted // self.shape.batch_size)
        return min(steps, self.max_steps) if self.max_steps is not None else steps

    def counts(self) -> Counter[str]:
        """State to number of samples; sums to prompts x epochs."""
        counts: Counter[str] = Counter(r.state for r in self.records.values())
        counts["rejected"] = len(self.rejected)
        counts["committed"] = self.committed_cursor - sum(p < self.committed_cursor for p in self.rejected)
        counts["pending"] += self.end - counts.total()
        return counts

    def ready(self) -> int:
        """Stored samples that stand in order at the front of the line, ready for the next steps."""
        ready, cursor = 0, self._assign_cursor
        while cursor in self.rejected or (cursor in self.records and self.records[cursor].state == "stored"):
            ready += cursor not in self.rejected
            cursor += 1
        return ready

    def stored_bytes(self) -> int:
        """Bytes of the samples that lie in the store now."""
        return sum(r.ref.num_bytes for r in self.records.values() if r.ref and r.state in ("stored", "assigned"))

    # ---- snapshot ----

    def snapshot(self, step: int) -> str:
        """The ledger as a checkpoint after ``step`` keeps it, as JSON."""
        cursor = self.steps[step].end if step in self.steps else self.committed_cursor
        rejected = [[p, *r.sample, r.reason] for p, r in sorted(self.rejected.items()) if p < cursor]
        shape = {name: getattr(self.shape, name) for name in LedgerShape.__dataclass_fields__}
        return json.dumps(
            {"version": SNAPSHOT_VERSION, "shape": shape, "step": step, "cursor": cursor, "rejected": rejected},
            indent=1,
        )

    def restore(self, text: str) -> None:
        """Take over a snapshot into this fresh ledger.

        Raises:
            ValueError: the snapshot is of other data, another seed or another batch size.
        """
        assert not self.records and not self.trained_step
        saved = json.loads(text)
        if saved["version"] != SNAPSHOT_VERSION:
            raise ValueError(
                f"the checkpoint's ledger has version {saved['version']}, this torchspec reads {SNAPSHOT_VERSION}"
            )
        knobs = {
            "dataset": "data.train",
            "prompts": "data.train",
            "batch_size": "training.batch_size",
            "seed": "run.seed",
        }
        for name, knob in knobs.items():
            if saved["shape"][name] != getattr(self.shape, name):
                raise ValueError(
                    f"cannot resume: {knob} is not what the checkpoint was trained with ({name} "
                    f"{saved['shape'][name]!r} then, {getattr(self.shape, name)!r} now); restore it, or start a new "
                    "run from the weights alone with training.init_from"
                )
        self.committed_step, self.committed_cursor = saved["step"], saved["cursor"]
        self.rejected = {p: Rejection(SampleId(e, i), reason) for p, e, i, reason in saved["rejected"]}
        self.__post_init__()

    # ---- helpers ----

    def _all_steps_assigned(self) -> bool:
        return self.max_steps is not None and self._assign_step >= self.max_steps

    def _find(self, sample: SampleId) -> Record | None:
        position = self._positions.get(sample)
        return None if position is None else self.records[position]

    def _leased(self, sample: SampleId, key: str) -> Record | None:
        record = self._find(sample)
        return record if record is not None and record.state == "leased" and record.key == key else None

    def _forget(self, position: int) -> None:
        del self._positions[self.records.pop(position).sample]
