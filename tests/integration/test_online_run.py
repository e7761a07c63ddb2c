"""A whole run: prompts in, a draft that a server could load out, nothing left behind."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.online import (
    EPOCHS,
    PROMPTS,
    STEPS,
    Command,
    journal,
    ledger_snapshot,
    processes_of,
    run_to_end,
    seeded_batches,
    wait_until_swept,
    write_config,
)
from torchspec.drafts.export import validate_export
from torchspec.monitor.snapshot import read_latest
from torchspec.monitor.views import events_view, sample_view, samples_view


def metric(run_dir, split, name):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if record["split"] == split]


@pytest.fixture
def run(undisturbed):
    return undisturbed.folder, undisturbed.output, undisturbed.started


def test_every_sample_is_trained_once_in_the_seeded_order(run):
    run_dir, _, _ = run
    assert {s: sorted(b) for s, b in journal(run_dir).items()} == {s: sorted(b) for s, b in seeded_batches().items()}
    snapshot = ledger_snapshot(run_dir)
    assert snapshot["step"] == STEPS and snapshot["cursor"] == PROMPTS * EPOCHS and snapshot["rejected"] == []


def test_the_draft_learns_and_the_metrics_say_so(run):
    run_dir, _, _ = run
    losses = metric(run_dir, "train", "loss")
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    assert metric(run_dir, "heldout", "step") == [3, 6, 9, 12]
    heldout = metric(run_dir, "heldout", "loss")
    assert heldout[-1] < heldout[0]


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


def test_the_ended_run_can_be_seen(run):
    run_dir, text, _ = run
    latest = read_latest(run_dir)
    assert latest.point.phase == "finished" and latest.point.step == STEPS
    assert latest.point.captured_samples >= PROMPTS * EPOCHS and latest.point.trained_samples == PROMPTS * EPOCHS
    assert latest.point.get_bytes > 0 and latest.point.rank_forward_seconds > 0
    kinds = [event["kind"] for event in events_view(run_dir)["events"]]
    assert "worker_started" in kinds and kinds.count("checkpoint") == 4 and kinds[-1] == "finished"
    sample = sample_view(run_dir, samples_view(run_dir)["samples"][0]["sample"])
    answers = {a["id"]: a["text"] for a in map(json.loads, (run_dir / "answers.jsonl").read_text().splitlines())}
    told = zip(sample["pieces"], sample["special"], strict=True)
    answer = "".join(piece for piece, special in list(told)[sample["prompt_tokens"] :] if not special)
    assert answers[sample["id"].split(" (")[0]].startswith(answer.strip())
    assert sum(sample["mask"]) == len(sample["mask"]) - sample["prompt_tokens"]
    durations = {moment: at for moment, at, _ in sample["timeline"]}
    assert durations["computing"] < durations["computed"] <= durations["putting"] < durations["stored"]
    status = run_to_end(run_dir.parent, "status", run_dir)
    assert "over the whole run" in status.text and f"step {STEPS}/{STEPS}" in status.text
    token = (run_dir / "ui_token").read_text()
    assert token not in text, "no secret in a log"


def test_nobody_else_could_reach_it_or_read_what_it_wrote(undisturbed):
    assert undisturbed.exposed == []
    run_dir, ray = undisturbed.folder, Path.home() / ".ray"
    private = {run_dir: 0o700, run_dir / "ui_token": 0o600, ray: 0o700, ray / "auth_token": 0o600}
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in private} == private


def test_nothing_is_left_behind(run):
    run_dir, _, started = run
    assert processes_of(run_dir) == []
    wait_until_swept(started)
    assert not (run_dir / "handle.json").exists()


def test_the_run_is_not_started_over_by_mistake(run, target_path):
    run_dir, _, _ = run
    again = Command(run_dir.parent, "train", run_dir.parent / "run.yaml")
    assert again.wait() == 2
    assert "torchspec resume" in again.text and "Traceback" not in again.text


@pytest.mark.slow  # tests/faults/test_run_scaling.py ends with ranks that share samples, and compares its losses, too
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 2), (1, 4), (3, 1)])
def test_ranks_that_share_every_sample_train_the_same_draft(run, target_path, ulysses, ring):
    """Ranks of which each fetches its own shards follow the loss curve of one rank that has everything."""
    run_dir, _, _ = run
    name = f"shared-{ulysses}x{ring}"
    shared = ("attention_backend=usp", f"sp_ulysses_size={ulysses}", f"sp_ring_size={ring}")
    overrides = [*(f"training.{knob}" for knob in shared), f"answer.reuse={run_dir / 'answers.jsonl'}"]
    run_to_end(run_dir.parent, "train", write_config(run_dir.parent, target_path, name), *overrides)
    shared_dir = run_dir.parent / name
    assert (shared_dir / "logs" / f"trainer-{ulysses * ring - 1}.log").exists()
    assert {s: sorted(b) for s, b in journal(shared_dir).items()} == {s: sorted(b) for s, b in seeded_batches().items()}
    for split in ("train", "heldout"):
        assert metric(shared_dir, split, "loss") == pytest.approx(metric(run_dir, split, "loss"), rel=1e-4)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (shared_dir, run_dir))
    for name, weight in theirs.items():
        assert (ours[name].float() - weight.float()).norm() <= 0.01 * weight.float().norm()
