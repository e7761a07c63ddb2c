"""A whole run: prompts in, a draft that a server could load out, nothing left behind."""

from __future__ import annotations

import json
import time

import pytest
from safetensors.torch import load_file

from tests.online import (
    EPOCHS,
    PROMPTS,
    STEPS,
    journal,
    ledger_snapshot,
    processes_of,
    run_to_end,
    seeded_batches,
    write_config,
)
from torchspec.export.hf import validate_export
from torchspec.inference.leftovers import find_shared_memory_leftovers


@pytest.fixture(scope="module")
def run(tmp_path_factory, target_path):
    folder = tmp_path_factory.mktemp("online")
    started = time.time()
    command = run_to_end(folder, "train", write_config(folder, target_path))
    return folder / "run", command.text, started


def test_every_sample_is_trained_once_in_the_seeded_order(run):
    run_dir, _, _ = run
    assert {s: sorted(b) for s, b in journal(run_dir).items()} == {s: sorted(b) for s, b in seeded_batches().items()}
    snapshot = ledger_snapshot(run_dir)
    assert snapshot["step"] == STEPS and snapshot["cursor"] == PROMPTS * EPOCHS and snapshot["rejected"] == []


def test_the_draft_learns_and_the_metrics_say_so(run):
    run_dir, _, _ = run
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    heldout = [r for r in records if r["split"] == "heldout"]
    assert [r["step"] for r in heldout] == [6, 12]
    assert heldout[1]["loss"] < heldout[0]["loss"]


def test_the_export_is_complete_and_holds_the_trained_weights(run):
    run_dir, _, _ = run
    validate_export(run_dir / "export")
    weights = load_file(run_dir / "export" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (512, 576)
    assert weights["fc.weight"].abs().sum() > 0


def test_answers_are_kept_and_written_once(run):
    run_dir, _, _ = run
    answers = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == PROMPTS + 4  # and the held-out ones
    assert all(0 < len(a["token_ids"]) <= 12 and a["text"].strip() for a in answers)


def test_what_a_person_gets(run):
    run_dir, text, _ = run
    assert "accept length" in text and "Traceback" not in text
    assert (run_dir / "curves.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").iterdir())
    assert (run_dir / "rejected.jsonl").read_text() == ""


def test_nothing_is_left_behind(run):
    run_dir, _, started = run
    assert processes_of(run_dir) == []
    assert find_shared_memory_leftovers(started) == []
    assert not (run_dir / "handle.json").exists()


def test_the_run_is_not_started_over_by_mistake(run, target_path):
    from tests.online import Command

    run_dir, _, _ = run
    again = Command(run_dir.parent, "train", run_dir.parent / "run.yaml")
    assert again.wait() == 2
    assert "torchspec resume" in again.text and "Traceback" not in again.text
