"""What the page is given: columns that agree with the run's files, increments that agree with the whole."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.simulation.pipeline import START, Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.config.load import parse_config, save_config
from torchspec.data.masks import pack_mask
from torchspec.monitor import views
from torchspec.monitor.record.timeline import SampleRecord
from torchspec.monitor.series import read_series
from torchspec.monitor.snapshot import to_line
from torchspec.monitor.trace import write_trace
from torchspec.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRun:
    run = SimulatedRun(tmp_path_factory.mktemp("views") / "run", Simulation(SCENARIOS["inference-bound"]))
    run.follow(150)
    run.kill_worker(0)
    run.scale(3)
    run.follow(150)
    return run


def test_rates_are_means_between_rows_whatever_their_distance(run: SimulatedRun) -> None:
    records = read_series(RunFolder(run.folder).history)
    for points in (None, 40):
        columns = views.history_view(run.folder, points=points)
        time, rate = np.array(columns["time"]), columns["training_samples_per_s"]
        assert rate[0] is None and len(time) == (points or len(records))
        trained = np.dot(np.diff(time), np.array(rate[1:], dtype=float))
        assert trained == pytest.approx(records[-1]["trained_samples"] - records[0]["trained_samples"])
    waits = [share for share in columns["rank_wait_share"] if share is not None]
    assert np.mean(waits[-10:]) == pytest.approx(1 - 3 / 3.84, abs=0.12)
    assert columns["samples_pending"][-1] == run.simulation.status().samples["pending"]


@pytest.mark.parametrize("view", [views.history_view, views.entities_view, views.steps_view, views.events_view])
def test_increments_add_up_to_the_whole(run: SimulatedRun, view) -> None:
    whole = view(run.folder)
    for since in (START + 100.0, START + 151.0):
        part = view(run.folder, since)
        assert part == _after(whole, since)


def _after(whole: dict, since: float) -> dict:
    """The rows of ``whole`` after ``since``, in whatever of the shapes it has."""
    if "events" in whole:
        return {"events": [event for event in whole["events"] if event["time"] > since]}
    if "train" in whole:
        return {split: _rows(whole[split], since) for split in whole}
    keep = [i for i, time in enumerate(whole["time"]) if time > since]
    rows: dict = {}
    for name, column in whole.items():
        if isinstance(column, dict):  # workers and ranks, those that are still there
            entities = {e: {n: [c[i] for i in keep] for n, c in columns.items()} for e, columns in column.items()}
            rows[name] = {e: c for e, c in entities.items() if any(v is not None for col in c.values() for v in col)}
        else:
            rows[name] = [column[i] for i in keep]
    return rows


def _rows(columns: dict, since: float) -> dict:
    keep = [i for i, time in enumerate(columns["time"]) if time > since]
    return {
        name: [[c[i] for i in keep] for c in column]
        if column and isinstance(column[0], list)
        else [column[i] for i in keep]
        for name, column in columns.items()
    }


def test_one_poll_brings_everything_that_is_new(run: SimulatedRun) -> None:
    since = START + 290.0
    update = views.update_view(run.folder, dict.fromkeys(("history", "entities", "steps", "events"), since))
    assert update["history"] == views.history_view(run.folder, since)
    assert update["steps"]["train"]["step"][-1] == run.simulation.ranks.step
    assert update["snapshot"]["point"]["step"] == run.simulation.ranks.step and update["live"] is False
    assert update["verdict"]["state"] == "ended" and update["verdict"]["side"] == "inference"
    assert "history" not in views.update_view(run.folder, {"events": since})


def test_a_worker_that_died_ends_in_the_series_and_in_the_table(run: SimulatedRun) -> None:
    workers = views.entities_view(run.folder)["workers"]
    assert list(workers) == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert workers["worker-0"]["samples_per_s"][-1] is None
    assert workers["worker-3"]["samples_per_s"][0] is None
    assert workers["worker-3"]["samples_per_s"][-1] == pytest.approx(1 / 0.36, rel=0.1)
    table = {w["name"]: w["doing"] for w in views.now_view(run.folder)["snapshot"]["workers"]}
    assert table["worker-0"] == "gone" and table["worker-3"] == "working"
    events = [event["kind"] for event in views.events_view(run.folder)["events"]]
    assert events.index("worker_lost") < events.index("scaled")


def test_a_resumed_runs_steps_replace_those_they_repeat(tmp_path: Path, run: SimulatedRun) -> None:
    report = asdict(replace(run.simulation.last_step, step=1))
    lines = [
        {"time": float(i), **report, "step": step, "loss": float(i), "split": split}
        for i, (step, split) in enumerate(
            [(1, "train"), (2, "train"), (2, "heldout"), (3, "train"), (2, "train"), (2, "heldout")], start=1
        )
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = views.steps_view(tmp_path)
    assert (view["train"]["step"], view["train"]["loss"]) == ([1, 2], [1.0, 5.0])
    assert (view["heldout"]["step"], view["heldout"]["loss"]) == ([2], [6.0])
    assert len(view["train"]["full_accuracy"]) == 5


def test_with_undone_steps_go_the_evaluations_that_came_after_them() -> None:
    kept = [(1, "train"), (2, "train"), (2, "heldout")]
    written = [*kept, (3, "train"), (4, "train"), (4, "heldout"), (3, "train")]
    train, heldout = views.undo([{"step": step, "split": split} for step, split in written])
    assert [[record["step"] for record in records] for records in (train, heldout)] == [[1, 2, 3], [2]]


def test_curves_of_long_runs_are_thinned_but_held_out_points_are_not(run: SimulatedRun) -> None:
    whole, thinned = views.steps_view(run.folder), views.steps_view(run.folder, points=30)
    assert len(thinned["train"]["step"]) <= 30 < len(whole["train"]["step"])
    assert thinned["train"]["step"][-1] == whole["train"]["step"][-1]
    assert thinned["heldout"] == whole["heldout"] and whole["heldout"]["step"]


def test_no_folder_is_too_young(tmp_path: Path) -> None:
    save_config(parse_config({"target": {"path": "unused"}}), tmp_path / "config.yaml")
    view = views.run_view(tmp_path)
    assert view["snapshot"] is None and view["verdict"]["state"] == "ended" and view["metrics"]
    assert views.history_view(tmp_path)["time"] == views.entities_view(tmp_path)["time"] == []
    assert views.steps_view(tmp_path)["train"]["step"] == []
    assert views.samples_view(tmp_path) == {"samples": []} and views.events_view(tmp_path) == {"events": []}


@pytest.fixture
def inspected(tmp_path: Path) -> Path:
    """A run with one sample, and a target whose tokens are bytes: characters may take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    (tmp_path / "target").mkdir()
    tokenizer.save(str(tmp_path / "target" / "tokenizer.json"))
    save_config(parse_config({"target": {"path": str(tmp_path / "target")}}), tmp_path / "config.yaml")
    ids = tokenizer.encode("Où? <|end|>Là.").ids
    prompt = len(tokenizer.encode("Où? <|end|>").ids)
    mask = [0] * prompt + [1] * (len(ids) - prompt)
    record = SampleRecord(
        time=20.0,
        sample="e0p3",
        id="three",
        worker="worker-1",
        step=7,
        attempts=2,
        tokens=len(ids),
        prompt_tokens=prompt,
        num_bytes=99,
        timeline=(
            ("leased", 10.0, "worker-0"),
            ("failed", 11.0, "worker-0 died"),
            ("leased", 12.0, "worker-1"),
            ("computing", 12.5, ""),
            ("computed", 13.0, ""),
            ("putting", 13.25, ""),
            ("stored", 13.5, ""),
            ("assigned", 15.0, "step 7"),
            ("fetched", 16.0, ""),
            ("trained", 19.0, ""),
            ("freed", 20.0, ""),
        ),
        token_ids=b64encode(np.array(ids, dtype="<i4").tobytes()).decode(),
        loss_mask=b64encode(pack_mask(mask)).decode(),
    )
    RunFolder(tmp_path).latest.parent.mkdir()
    (RunFolder(tmp_path).samples).write_bytes(to_line(record))
    return tmp_path


def test_a_sample_is_shown_as_text_with_its_loss_mask_over_the_tokens(inspected: Path) -> None:
    (listed,) = views.samples_view(inspected)["samples"]
    assert listed["sample"] == "e0p3" and "token_ids" not in listed
    sample = views.sample_view(inspected, "e0p3")
    end = sample["prompt_tokens"]
    assert ("".join(sample["pieces"][:end]), "".join(sample["pieces"][end:])) == ("Où? <|end|>", "Là.")
    assert len(sample["pieces"]) == len(sample["mask"]) == 10
    assert [p for p, s in zip(sample["pieces"], sample["special"], strict=True) if s] == ["<|end|>"]
    assert "".join(p for p, m in zip(sample["pieces"], sample["mask"], strict=True) if m) == "Là."
    with pytest.raises(KeyError):
        views.sample_view(inspected, "e0p4")


def test_without_the_targets_tokenizer_there_are_numbers(inspected: Path) -> None:
    (inspected / "target" / "tokenizer.json").unlink()
    sample = views.sample_view(inspected, "e0p3")
    assert len(sample["pieces"]) == 10 and all(p.strip("⟨⟩").isdigit() for p in sample["pieces"])


def test_a_trace_shows_the_way_from_worker_to_training(inspected: Path) -> None:
    assert write_trace(inspected, "e0p3", inspected / "trace.json") == 1
    trace = json.loads((inspected / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in trace if e["ph"] == "M"}
    spans = [(names[e["pid"]], e["cat"], e["ts"] / 1e6, e["dur"] / 1e6) for e in trace if e["ph"] == "X"]
    assert spans[0] == ("worker-0", "leased", 10.0, 1.0) and spans[1] == ("worker-0", "failed", 11.0, 1.0)
    assert ("worker-1", "computing", 12.5, 0.5) in spans and ("store", "stored", 13.5, 1.5) in spans
    assert spans[-1] == ("training", "trained", 19.0, 1.0)
    assert sum(s[3] for s in spans) == pytest.approx(10.0), "no gap and no overlap"
    with pytest.raises(ValueError, match="e9p9 was not followed; try e0p3"):
        write_trace(inspected, "e9p9", inspected / "other.json")
