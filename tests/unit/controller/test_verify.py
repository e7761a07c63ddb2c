"""The proof from a journal: it holds for what a ledger writes, and notices every kind of damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.contracts import SampleRef
from torchspec.controller.ledger import Ledger, LedgerShape
from torchspec.controller.verify import EpochCount, Proof, verify, verify_run
from torchspec.data.order import epoch_order

PROMPTS, EPOCHS, BATCH = 10, 2, 4
SHAPE = LedgerShape("data", PROMPTS, EPOCHS, BATCH, 7)


class Run:
    """A ledger driven by chance, its events written as the controller writes them."""

    def __init__(self, chance: random.Random, shape: LedgerShape = SHAPE, max_steps: int | None = None):
        self.chance, self.shape, self.max_steps = chance, shape, max_steps
        self.events: list[dict] = []
        self.snapshot: str | None = None
        self.ledger = Ledger(shape, 12, 2, max_steps)
        self.start()

    def start(self, resumed: bool = False, remember: bool = False) -> None:
        """Go on from the checkpoint; ``remember`` what has been rejected since."""
        if not remember:
            self.ledger = Ledger(self.shape, 12, 2, self.max_steps)
        self.ledger.rewind(self.snapshot)
        self.known = set(self.ledger.rejected)
        line = {name: getattr(self.shape, name) for name in LedgerShape.__dataclass_fields__}
        self.events.append({"event": "started", **line, "max_steps": self.max_steps, "reorder_window": 12})
        if resumed:
            self.events.append({"event": "resumed", "step": self.ledger.committed_step})

    def train(self, steps: int = 100, reject: float = 0.0, commit: bool = True) -> Run:
        """So many steps, or to the end; samples fail with a chance of ``reject``, also when already in a step."""
        for _ in range(steps):
            while (step := self.ledger.assign()) is None and not self.ledger.exhausted:
                self._produce(reject)
            if step is None:
                break
            self._lose(step, reject)
            self.ledger.train(step)
            samples = [list(r.sample) for r in self.ledger.step_records(step)]
            self.events.append(
                {"event": "trained", "step": step, "end": self.ledger.trained_cursor, "samples": samples}
            )
            if commit and self.chance.random() < 0.5:
                self.commit()
        return self

    def commit(self) -> None:
        self.snapshot = self.ledger.snapshot(self.ledger.trained_step)
        self.ledger.commit(self.ledger.trained_step)
        self.events.append({"event": "committed", "step": self.ledger.trained_step, "folder": "x"})

    def _produce(self, reject: float) -> None:
        leased = []
        while (record := self.ledger.next_to_lease()) is not None:
            leased.append(self.ledger.lease(record, "w", "r"))
        self.chance.shuffle(leased)
        for record in leased:
            if self.chance.random() < reject:
                self.ledger.fail(record, "bad", final=self.chance.random() < 0.5)
            else:
                self.ledger.store(record, SampleRef(record.sample, record.key, 5, b"\xf8", {}, 100, "post_norm"))
        self._note_rejected()

    def _lose(self, step: int, reject: float) -> None:
        """Objects of an assigned step are lost; some cannot be captured again."""
        for record in self.ledger.step_records(step):
            if self.chance.random() < reject:
                self.ledger.put_back(record)
        while any(r.state != "assigned" for r in self.ledger.step_records(step)):
            self._produce(reject)

    def _note_rejected(self) -> None:
        for position in sorted(set(self.ledger.rejected) - self.known):
            sample = list(self.ledger.rejected[position].sample)
            self.events.append({"event": "rejected", "id": "p", "sample": sample, "reason": "bad"})
        self.known = set(self.ledger.rejected)

    def lines(self) -> list[str]:
        """A line that is text already is damaged."""
        return [
            (event if isinstance(event, str) and "\0" in event else json.dumps(event)) + "\n" for event in self.events
        ]

    def proof(self) -> Proof:
        return verify(self.lines(), self.snapshot)


def whole_run(seed: int = 0, reject: float = 0.0) -> Run:
    run = Run(random.Random(seed)).train(reject=reject)
    run.commit()
    return run


def test_a_whole_run_is_proven():
    proof = whole_run().proof()
    assert proof == Proof((EpochCount(0, 10, 10, 10, 0), EpochCount(1, 10, 10, 10, 0)), 5, 5, 0, True, ())


def test_an_unfinished_run_is_proven_as_far_as_it_got():
    run = Run(random.Random(0)).train(3, commit=False)
    proof = run.proof()
    assert proof.proven and not proof.finished
    assert proof.epochs == (EpochCount(0, 10, 10, 0, 0), EpochCount(1, 10, 2, 0, 0))
    run.commit()
    assert [e.committed for e in run.proof().epochs] == [10, 2]


def test_trained_is_not_finished_before_it_is_committed():
    run = Run(random.Random(0)).train(commit=False)
    assert not run.proof().finished
    run.commit()
    assert run.proof().finished


def test_a_run_with_a_limit_of_steps_finishes_there():
    run = Run(random.Random(0), max_steps=3).train()
    run.commit()
    proof = run.proof()
    assert proof.proven and proof.finished and proof.epochs[1].left == 8


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1),
    prompts=st.integers(1, 12),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 5),
    reject=st.sampled_from([0.0, 0.1, 0.5]),
    crashes=st.lists(st.integers(0, 4), max_size=4),
    remember=st.booleans(),
)
def test_whatever_a_ledger_goes_through_is_proven(seed, prompts, epochs, batch, reject, crashes, remember):
    """Rejections before and after a sample has its step, checkpoints at any step, resumes that undo both or only
    steps."""
    run = Run(random.Random(seed), LedgerShape("data", prompts, epochs, batch, seed))
    for steps in crashes:
        run.train(steps, reject)
        run.start(resumed=True, remember=remember)
    run.train(reject=reject)
    run.commit()
    proof = run.proof()
    assert proof.violations == () and proof.finished and proof.resumes == len(crashes)
    assert all(e.committed + e.rejected == prompts for e in proof.epochs)
    assert sum(e.rejected for e in proof.epochs) == len(run.ledger.rejected)


# ---- damage ----


def steps_of(run: Run) -> list[dict]:
    return [e for e in run.events if e["event"] == "trained"]


def swap_two_steps(run: Run) -> None:
    first, second, *_ = steps_of(run)
    first["samples"], second["samples"] = second["samples"], first["samples"]


def swap_within_a_step(run: Run) -> None:
    samples = steps_of(run)[1]["samples"]
    samples[0], samples[1] = samples[1], samples[0]


def train_twice(run: Run) -> None:
    first, second, *_ = steps_of(run)
    second["samples"][2] = first["samples"][0]


def train_twice_in_a_step(run: Run) -> None:
    step = steps_of(run)[1]["samples"]
    step[3] = step[0]


def lose_a_sample(run: Run) -> None:
    del steps_of(run)[1]["samples"][1]


def lose_a_samples_position(run: Run) -> None:
    """The step is as if the sample had never been in line."""
    second, third = steps_of(run)[1:3]
    second["samples"].append(third["samples"].pop(0))


def drop_a_step(run: Run) -> None:
    run.events.remove(steps_of(run)[2])


def drop_the_last_step(run: Run) -> None:
    run.events.remove(steps_of(run)[-1])


def repeat_a_step(run: Run) -> None:
    run.events.insert(run.events.index(steps_of(run)[2]), steps_of(run)[1])


def reject_a_trained_sample(run: Run) -> None:
    sample = steps_of(run)[0]["samples"][1]
    run.events.append({"event": "rejected", "id": "p", "sample": sample, "reason": "bad"})


def train_a_rejected_sample(run: Run) -> None:
    sample = steps_of(run)[1]["samples"][1]
    run.events.insert(1, {"event": "rejected", "id": "p", "sample": sample, "reason": "bad"})


def train_a_stranger(run: Run) -> None:
    steps_of(run)[3]["samples"][0] = [0, PROMPTS]


def train_an_epoch_too_many(run: Run) -> None:
    steps_of(run)[4]["samples"][0] = [EPOCHS, 0]


def train_heldout(run: Run) -> None:
    steps_of(run)[4]["samples"][0] = [-1, 0]


def too_large_a_step(run: Run) -> None:
    """Two steps in one: every sample in order, none lost."""
    first, second, *others = steps_of(run)
    first["samples"] += second["samples"]
    first["end"] = second["end"]
    run.events.remove(second)
    for step in others:
        step["step"] -= 1


def another_seed(run: Run) -> None:
    run.events[0]["seed"] += 1


def another_end(run: Run) -> None:
    steps_of(run)[0]["end"] += 1


def end_beyond_the_line(run: Run) -> None:
    steps_of(run)[4]["end"] = PROMPTS * EPOCHS + 1


def commit_the_future(run: Run) -> None:
    run.events.insert(2, {"event": "committed", "step": 4, "folder": "x"})


def commit_backwards(run: Run) -> None:
    run.events.append({"event": "committed", "step": 0, "folder": "x"})


def resume_from_the_future(run: Run) -> None:
    run.events.append({"event": "resumed", "step": 9})


def forget_the_resume(run: Run) -> None:
    """What a second start trains again is trained twice."""
    run.events += [run.events[0], *steps_of(run)[3:]]


def start_with_other_data(run: Run) -> None:
    run.events += [run.events[0] | {"dataset": "other"}, {"event": "resumed", "step": 5}]


def no_start(run: Run) -> None:
    del run.events[0]


def no_events(run: Run) -> None:
    run.events.clear()


def unknown_events_only(run: Run) -> None:
    run.events[:] = [{"event": "leased", "step": 1}]


def nothing_but_a_start(run: Run) -> None:
    del run.events[1:]


def not_a_record(run: Run) -> None:
    run.events.insert(3, "trained")  # type: ignore[arg-type]


def no_samples(run: Run) -> None:
    del steps_of(run)[1]["samples"]


def a_damaged_line(run: Run) -> None:
    run.events.insert(3, "\0" * 40)  # type: ignore[arg-type]


def a_damaged_step(run: Run) -> None:
    run.events[run.events.index(steps_of(run)[1])] = "\0" * 40  # type: ignore[call-overload]


def a_number_that_is_none(run: Run) -> None:
    steps_of(run)[1]["step"] = "2"


DAMAGE: dict[Callable[[Run], None], str] = {
    swap_two_steps: "line 2: step 1 trains",
    swap_within_a_step: "where the seeded order has",
    train_twice: "trains a second time",
    train_twice_in_a_step: "was lost",
    lose_a_sample: "was lost: neither trained nor rejected",
    lose_a_samples_position: "where the seeded order has",
    drop_a_step: "step 4 follows step 2",
    drop_the_last_step: "its tail is missing",
    repeat_a_step: "step 2 follows step 2",
    reject_a_trained_sample: "is rejected, and had been trained",
    train_a_rejected_sample: "trains the rejected",
    train_a_stranger: "e0p10 is no sample of this run",
    train_an_epoch_too_many: "e2p0 is no sample of this run",
    train_heldout: "e-1p0 is no sample of this run",
    too_large_a_step: "has 8 samples, of a batch of 4",
    another_seed: "where the seeded order has",
    another_end: "line 2: step 1 trains",
    end_beyond_the_line: "ends at position 21",
    commit_the_future: "a checkpoint of step 4",
    commit_backwards: "a checkpoint of step 0",
    resume_from_the_future: "which the journal has not seen",
    forget_the_resume: "does not say which step",
    start_with_other_data: "started again with dataset 'other'",
    no_start: "the journal's beginning is missing",
    no_events: "the journal is empty",
    unknown_events_only: "the journal is empty",
    nothing_but_a_start: "its tail is missing",
    not_a_record: "not a journal's line",
    a_damaged_line: "line 4: damaged: what it said cannot be proven",
    a_damaged_step: "line 3: damaged: what it said cannot be proven",
    no_samples: "not a journal's line (KeyError",
    a_number_that_is_none: "step 2 follows step 1",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_noticed(damage):
    run = Run(random.Random(0)).train(commit=False)
    run.commit()
    assert run.proof().proven
    damage(run)
    violations = run.proof().violations
    assert any(DAMAGE[damage] in violation for violation in violations), violations


def test_a_missing_rejection_is_noticed():
    run = whole_run(seed=3, reject=0.4)
    rejections = [e for e in run.events if e["event"] == "rejected"]
    assert run.proof().proven and rejections
    for rejection in rejections:
        others = [e for e in run.events if e is not rejection]
        assert not verify([json.dumps(e) + "\n" for e in others]).proven


def test_a_rejection_too_many_is_noticed_by_the_checkpoint_or_the_order():
    run = whole_run(seed=3, reject=0.4)
    rejection = next(e for e in run.events if e["event"] == "rejected")
    run.events.append(rejection)
    assert "had been rejected" in run.proof().violations[0]


@pytest.mark.parametrize("name", ["step", "cursor", "rejected", "dataset"])
def test_a_checkpoint_that_tells_another_story_is_noticed(name):
    run = whole_run()
    snapshot = json.loads(run.snapshot)
    if name == "dataset":
        snapshot["shape"]["dataset"] = "other"
    else:
        snapshot[name] = [[0, 0, 0, "bad"]] if name == "rejected" else snapshot[name] - 1
    assert not verify(run.lines(), json.dumps(snapshot)).proven


@pytest.mark.parametrize("kept", range(12))
def test_a_cut_journal_is_never_proven_against_its_checkpoint_unless_all_of_its_steps_are_there(kept):
    run = Run(random.Random(0)).train(commit=False)
    run.commit()
    proof = verify(run.lines()[:kept], run.snapshot)
    assert proof.proven == (kept >= 6)
    assert proof.finished == (kept >= 7)


def test_a_sample_rejected_after_the_checkpoint_may_be_trained_rejected_again_or_passed_over():
    start = {
        "event": "started",
        "dataset": "d",
        "prompts": 4,
        "epochs": 1,
        "batch_size": 2,
        "seed": 1,
        "max_steps": None,
    }
    line = [int(p) for p in epoch_order(1, 0, 4)]
    rejected = {"event": "rejected", "sample": [0, line[1]], "reason": "bad"}
    before = [start, rejected, {"event": "resumed", "step": 0}]

    def judge(*events: dict) -> Proof:
        return verify([json.dumps(event) + "\n" for event in (*before, *events)])

    def step(end: int, *rows: int) -> dict:
        return {"event": "trained", "step": 1, "end": end, "samples": [[0, line[row]] for row in rows]}

    assert judge(step(2, 0, 1)).epochs == (EpochCount(0, 4, 2, 0, 0),)
    assert judge(step(3, 0, 2)).epochs == (EpochCount(0, 4, 2, 0, 1),)
    assert judge(rejected, step(3, 0, 2)).epochs == (EpochCount(0, 4, 2, 0, 1),)
    assert all(judge(*events).proven for events in [(step(2, 0, 1),), (step(3, 0, 2),), (rejected, step(3, 0, 2))])
    assert "trains the rejected" in judge(rejected, step(2, 0, 1)).violations[0]
    assert "where the seeded order has" in judge(step(3, 1, 2)).violations[0]
    assert "had been rejected" in judge(step(3, 0, 2), rejected).violations[0]


def test_a_torn_last_line_says_nothing():
    lines = whole_run().lines()
    torn = verify([*lines, '{"event": "trained", "step"'])
    assert torn.proven and torn == verify(lines)
    assert not verify([*lines, '{"event": "trained", "step"\n', lines[-1]]).proven


def test_a_launch_that_failed_early_spoils_nothing():
    """The journal is begun before the page's port is bound; who fails there may choose other data or another seed."""
    failed = Run(random.Random(0), LedgerShape("typo", 3, 1, BATCH, 8))
    failed.train(1, commit=False)
    run = Run(random.Random(0))
    run.start(resumed=True)
    run.train()
    run.commit()
    lines = failed.lines() + run.lines()[1:]
    proof = verify(lines, run.snapshot)
    assert proof.proven and proof.finished and proof.epochs == whole_run().proof().epochs
    failed.commit()
    assert "started again with dataset 'data', it was 'typo'" in verify(failed.lines() + run.lines()[1:]).violations[0]


def test_a_name_with_line_separators_of_its_own_and_bytes_that_are_no_text_are_no_lines(tmp_path):
    run = whole_run(seed=3, reject=0.4)
    rejection = next(event for event in run.events if event["event"] == "rejected")
    rejection["id"] = "a\u2028b\x85c"
    journal = tmp_path / "ledger.jsonl"
    journal.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in run.events))
    assert verify_run(tmp_path).proven
    with journal.open("ab") as file:
        file.write(b"\xff\xfe\0\n")
    assert verify_run(tmp_path).violations == (f"line {len(run.events) + 1}: damaged: what it said cannot be proven",)


def test_a_checkpoint_that_is_gone_cannot_confirm_anything(tmp_path):
    run = whole_run()
    (tmp_path / "ledger.jsonl").write_text("".join(run.lines()))
    folder = tmp_path / "checkpoints" / "step_000005"
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(run.snapshot)
    (tmp_path / "checkpoints" / "latest").symlink_to("step_000005")
    assert verify_run(tmp_path) == run.proof()
    (folder / "ledger.json").unlink()
    gone = ("the latest checkpoint, step_000005, is gone or not complete: it cannot confirm the journal",)
    assert verify_run(tmp_path).violations == gone
    folder.rmdir()
    assert verify_run(tmp_path).violations == gone


def test_a_run_without_a_journal_is_not_proven(tmp_path):
    assert verify_run(tmp_path).violations == ("the journal is empty",)
