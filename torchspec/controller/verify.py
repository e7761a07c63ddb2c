"""Proves from a run's journal alone that nothing was lost, nothing trained twice, and every batch was the seeded one.

    started      the shape of the order of positions (``ledger.py``): data, epochs, batch size, seed. As long as nothing
                 is committed, a launch with another shape begins anew
    resumed      a checkpoint's step: later steps were undone; a sample rejected later may be tried again, or not
    trained      a step's samples in order, and ``end``, the position after the last that it considered
    rejected     a sample that no step will have
    committed    a step whose checkpoint is safely in place

The proof replays these on an array with one state a position, and does not share code with the ledger: what it knows
of the order is the seed. Each step must hold exactly the positions between the last step's ``end`` and its own that
were not rejected. A journal says nothing of its own missing tail, so the latest checkpoint's ledger is held against it,
and nobody knows what a damaged line has said, so one with such a line is not proven.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchspec.contracts import HELDOUT_EPOCH, SampleId
from torchspec.data.order import epoch_order
from torchspec.run_folder import LEDGER_FILE, RunFolder

OPEN, TRAINED, REJECTED, REJECTED_BEFORE = range(4)
"""What is known of a position; the last: rejected after the checkpoint that the run went back to."""

FIXED = ("dataset", "prompts", "batch_size", "seed")
"""What a resume must not change."""


@dataclass(frozen=True, slots=True)
class EpochCount:
    """Samples of one epoch; ``committed`` of the trained ones are part of a checkpoint."""

    epoch: int
    prompts: int
    trained: int
    committed: int
    rejected: int

    @property
    def left(self) -> int:
        return self.prompts - self.trained - self.rejected


@dataclass(frozen=True, slots=True)
class Proof:
    """What a journal proves, or the violations that it shows, each naming its line."""

    epochs: tuple[EpochCount, ...]
    steps: int
    committed_step: int
    resumes: int
    finished: bool
    """Every sample is committed or rejected, or ``training.max_steps`` steps are committed."""
    violations: tuple[str, ...]

    @property
    def proven(self) -> bool:
        return not self.violations


def verify_run(run_dir: Path) -> Proof:
    """Verify ``ledger.jsonl`` of ``run_dir`` against the ledger in its latest checkpoint."""
    run = RunFolder(run_dir)
    latest = run.checkpoints / "latest"
    gone = latest.is_symlink() and not (latest / LEDGER_FILE).is_file()
    checkpoint = None if gone else run.newest_checkpoint()  # read first: a running run only adds to both
    snapshot = None if checkpoint is None else (checkpoint / LEDGER_FILE).read_text()
    lines = run.journal.read_bytes().splitlines(keepends=True) if run.journal.exists() else []
    proof = verify([line.decode(errors="replace") for line in lines], snapshot)
    if gone:
        missing = f"the latest checkpoint, {latest.readlink()}, is gone or not complete: it cannot confirm the journal"
        return replace(proof, violations=(*proof.violations, missing))
    return proof


def verify(lines: Sequence[str], snapshot: str | None = None) -> Proof:
    """Replay a journal.

    Args:
        lines: the journal's. A torn last one, which a ``kill -9`` may leave, says nothing and is passed over.
        snapshot: ``ledger.json`` of the run's latest checkpoint.
    """
    replay = _Replay()
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            replay.read(number, line)
    if not replay.shape:
        return Proof((), 0, 0, 0, False, tuple(replay.violations) or ("the journal is empty",))
    replay.check_gaps()
    if snapshot is not None:
        replay.check_snapshot(json.loads(snapshot))
    return replay.proof()


class _Replay:
    def __init__(self) -> None:
        self.shape: dict[str, Any] = {}  # until the run has started
        self.violations: list[str] = []
        self._states = np.zeros(0, dtype=np.uint8)  # one a position
        self._ends = [0]  # of each step, from 0
        self._committed_step = self._resumes = 0
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._restarted = False
        self._line = 0
        self._handlers = {
            "started": self._started,
            "resumed": self._resumed,
            "trained": self._trained,
            "rejected": self._rejected,
            "committed": self._committed,
        }

    def read(self, number: int, line: str) -> None:
        self._line = number
        try:
            record = json.loads(line)
        except ValueError:
            self._wrong("damaged: what it said cannot be proven")
            return
        try:
            event = record["event"]
            if event not in self._handlers:
                return
            if not self.shape and event != "started":
                self._wrong(f"{event} before the run has started: the journal's beginning is missing")
                return
            if self._restarted and event != "resumed":
                self._wrong(f"{event} after another start that does not say which step it goes on from")
            self._restarted = False
            self._handlers[event](record)
        except (ValueError, KeyError, TypeError) as error:
            self._wrong(f"not a journal's line ({type(error).__name__}: {error})")

    # ---- events ----

    def _started(self, record: dict[str, Any]) -> None:
        shape = {name: record[name] for name in (*FIXED, "epochs", "max_steps")}
        if self.shape:
            self._restarted = True
            other = [name for name in FIXED if shape[name] != self.shape[name]]
            if other and self._committed_step:
                name = other[0]
                self._wrong(f"started again with {name} {shape[name]!r}, it was {self.shape[name]!r}")
                return
            if other:
                self._states, self._ends, self._orders = self._states[:0], [0], {}
        self.shape = shape
        positions = shape["prompts"] * shape["epochs"]
        kept = self._states[:positions]
        self._states = np.concatenate([kept, np.zeros(positions - len(kept), dtype=np.uint8)])

    def _resumed(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self._resumes += 1
        if not 0 <= step <= self._steps:
            self._wrong(f"resumed from step {step}, which the journal has not seen: it ends at {self._steps}")
            return
        del self._ends[step + 1 :]
        undone = self._states[self._ends[-1] :]
        undone[:] = np.where(np.isin(undone, (REJECTED, REJECTED_BEFORE)), REJECTED_BEFORE, OPEN)
        self._committed_step = step

    def _trained(self, record: dict[str, Any]) -> None:
        step, end, start = record["step"], record["end"], self._ends[-1]
        if step != self._steps + 1:
            self._wrong(f"step {step} follows step {self._steps}")
            return
        if not start <= end <= len(self._states):
            self._wrong(f"step {step} ends at position {end}, after {start} and of {len(self._states)}")
            return
        positions = [self._position(SampleId(*sample)) for sample in record["samples"]]
        self._check_batch(step, positions, start, end)
        self._states[[p for p in positions if p is not None]] = TRAINED
        passed = self._states[start:end]
        passed[passed == REJECTED_BEFORE] = REJECTED
        self._ends.append(end)

    def _check_batch(self, step: int, positions: list[int | None], start: int, end: int) -> None:
        known = [p for p in positions if p is not None]
        expected = [
            p
            for p in range(start, end)
            if self._states[p] in (OPEN, TRAINED) or (self._states[p] == REJECTED_BEFORE and p in known)
        ]
        for position in known:
            if self._states[position] in (TRAINED, REJECTED):
                done = "trains a second time" if self._states[position] == TRAINED else "trains the rejected"
                self._wrong(f"step {step} {done} {self._name(position)}")
        if positions != expected:
            self._wrong(
                f"step {step} trains {self._names(positions)} where the seeded order has {self._names(expected)}"
            )
        batch, rejected = self.shape["batch_size"], end - start - len(expected)
        short = batch - len(positions)
        if short < 0 or (short > rejected and end < len(self._states)):
            self._wrong(f"step {step} has {len(positions)} samples, of a batch of {batch} and {rejected} rejected")

    def _rejected(self, record: dict[str, Any]) -> None:
        sample = SampleId(*record["sample"])
        if sample.epoch == HELDOUT_EPOCH:
            return
        position = self._position(sample)
        if position is None:
            return
        if self._states[position] in (TRAINED, REJECTED):
            done = "trained" if self._states[position] == TRAINED else "rejected"
            self._wrong(f"{sample} is rejected, and had been {done}")
        self._states[position] = REJECTED

    def _committed(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if not self._committed_step <= step <= self._steps:
            self._wrong(f"a checkpoint of step {step}, after one of {self._committed_step} and {self._steps} steps")
            return
        self._committed_step = step

    # ---- the end ----

    def check_gaps(self) -> None:
        """Every position that a step has passed is trained or rejected."""
        for position in np.flatnonzero(self._states[: self._ends[-1]] == OPEN):
            self.violations.append(f"{self._name(int(position))} was lost: neither trained nor rejected")

    def check_snapshot(self, snapshot: dict[str, Any]) -> None:
        """A checkpoint's ledger and the journal must tell the same story up to the checkpoint's step."""
        step, cursor = snapshot["step"], snapshot["cursor"]
        if step > self._steps:
            self.violations.append(
                f"the latest checkpoint is of step {step} and the journal ends at step {self._steps}: its tail is "
                "missing"
            )
            return
        for name in FIXED:
            if snapshot["shape"][name] != self.shape[name]:
                self.violations.append(f"the latest checkpoint has {name} {snapshot['shape'][name]!r}")
        if cursor != self._ends[step]:
            self.violations.append(f"the latest checkpoint ends at {cursor}, the journal's step {step} at another")
        saved = [position for position, *_ in snapshot["rejected"]]
        if saved != np.flatnonzero(self._states[: self._ends[step]] == REJECTED).tolist():
            self.violations.append(f"the latest checkpoint rejects other samples than the journal up to step {step}")

    def proof(self) -> Proof:
        prompts, committed_end = self.shape["prompts"], self._ends[self._committed_step]
        counts = []
        for epoch in range(self.shape["epochs"]):
            first = epoch * prompts
            states = self._states[first : first + prompts]
            trained = states == TRAINED
            committed = trained[: max(0, committed_end - first)]
            rejected = int((states >= REJECTED).sum())
            counts.append(EpochCount(epoch, prompts, int(trained.sum()), int(committed.sum()), rejected))
        done = all(count.left == 0 for count in counts) or self._steps == self.shape["max_steps"]
        return Proof(
            epochs=tuple(counts),
            steps=self._steps,
            committed_step=self._committed_step,
            resumes=self._resumes,
            finished=done and self._committed_step == self._steps,
            violations=tuple(self.violations),
        )

    # ---- small things ----

    @property
    def _steps(self) -> int:
        return len(self._ends) - 1

    def _wrong(self, what: str) -> None:
        self.violations.append(f"line {self._line}: {what}")

    def _position(self, sample: SampleId) -> int | None:
        """Where the sample stands in the order; None, and a violation, if it is none of the run's."""
        epoch, prompt = sample
        if not (0 <= epoch < self.shape["epochs"] and 0 <= prompt < self.shape["prompts"]):
            self._wrong(f"{sample} is no sample of this run")
            return None
        _, rows = self._order(epoch)
        return epoch * self.shape["prompts"] + int(rows[prompt])

    def _name(self, position: int) -> str:
        epoch, row = divmod(position, self.shape["prompts"])
        order, _ = self._order(epoch)
        return str(SampleId(epoch, int(order[row])))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of each row of ``epoch``, and the row of each prompt."""
        if epoch not in self._orders:
            order = epoch_order(self.shape["seed"], epoch, self.shape["prompts"])
            self._orders[epoch] = order, np.argsort(order)
        return self._orders[epoch]

    def _names(self, positions: Iterable[int | None]) -> str:
        return "[" + " ".join("?" if p is None else self._name(p) for p in positions) + "]"
