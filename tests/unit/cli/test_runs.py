"""A run from another terminal: its status, what can be asked of one that is over, and how far it is proven."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from tests.unit.cli.commands import command, run
from torchspec.cli.arguments import find_run
from torchspec.data.order import epoch_order
from torchspec.files import JsonLines


def test_a_run_that_is_over_cannot_be_asked(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_run("old") == find_run("runs/old") == old_run
    for arguments in (["stop", "old"], ["scale", "old", "--inference", "2"]):
        assert run(monkeypatch, *arguments) == 2
        assert "is not running now" in capsys.readouterr().err
    for name, reason in (("status", "has no metrics"), ("trace", "no sample")):
        assert run(monkeypatch, name, "old") == 2
        assert reason in capsys.readouterr().err
    assert run(monkeypatch, "scale", "old") == 2
    assert "--inference K, --dp D, --sp N" in capsys.readouterr().err


def test_the_status_of_a_run_that_was_killed_says_which_side_was_slow_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    folder = tmp_path / "killed"
    simulation = Simulation(SCENARIOS["inference-bound"])
    SimulatedRun(folder, simulation).follow(200)
    assert run(monkeypatch, "status", str(folder)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"step {simulation.ranks.step}/" in text and "worker-1" in text
    assert "inference is the bottleneck" in text and "2 more inference workers would balance" in text
    assert "torchspec resume" in text
    assert run(monkeypatch, "status", "--json", str(folder)) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["verdict"]["side"] == "inference" and known["live"] is False and known["step"] == simulation.ranks.step
    assert run(monkeypatch, "trace", str(folder)) == 0
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_the_page_of_a_run_is_served_without_its_token_in_the_output(old_run: Path) -> None:
    with command("ui", "old", "--port", "0") as page:
        assert page.stdout is not None
        line = page.stdout.readline()
        page.send_signal(signal.SIGINT)
    token = old_run / "ui_token"
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/ \(its token: {re.escape(str(token))}\)\n", line)
    assert token.read_text() not in line and page.returncode == 130


def test_verify_says_how_far_a_run_is_proven_and_names_what_is_not(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "verify", "old") == 1
    assert "the journal is empty" in capsys.readouterr().out
    (first, second, third), others = epoch_order(5, 0, 8)[:3].tolist(), {"max_steps": None, "epochs": 1}
    shape = {"dataset": "d", "prompts": 8, "batch_size": 2, "seed": 5}
    journal = JsonLines(old_run / "ledger.jsonl")
    journal.write({"event": "started", **shape, **others})
    journal.write({"event": "trained", "step": 1, "end": 2, "samples": [[0, first], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 0
    assert "proven, so far: 1 steps" in capsys.readouterr().out
    journal.write({"event": "trained", "step": 2, "end": 4, "samples": [[0, third], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 1
    assert f"line 3: step 2 trains a second time e0p{second}" in capsys.readouterr().out
    assert run(monkeypatch, "verify", "old", "--json") == 1
    known = json.loads(capsys.readouterr().out)
    assert known["proven"] is False and known["steps"] == 2 and f"e0p{second}" in known["violations"][0]
