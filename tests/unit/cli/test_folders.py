"""``list``, ``logs`` and ``rm``: runs as folders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from tests.unit.cli.commands import command, run
from torchspec.config.load import load_config, save_config
from torchspec.monitor.snapshot import read_latest, to_line
from torchspec.run_folder import RunFolder, this_process


@pytest.fixture
def runs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in every state, all with the same figures."""
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs")
    for name in ("finished", "stopped", "training"):
        made = SimulatedRun(folder / name, Simulation(SCENARIOS["balanced"]))
        made.follow(60)
        save_config(load_config(recipe, ["draft.kind=dflash"]), folder / name / "config.yaml")
        latest = read_latest(folder / name)
        assert latest is not None
        RunFolder(folder / name).latest.write_bytes(to_line(replace(latest, status=replace(latest.status, phase=name))))
    (folder / "nothing yet").mkdir()
    save_config(load_config(recipe), folder / "nothing yet" / "config.yaml")
    (folder / "no run").mkdir()
    return folder


def test_runs_are_listed_with_how_they_are(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(runs / "stopped").evaluations.write_text('{"time": 1.0, "accept_length": 1.75}\n')
    assert run(monkeypatch, "list", "--json") == 0
    listed = {found["name"]: found for found in json.loads(capsys.readouterr().out)}
    states = {"finished": "finished", "stopped": "stopped", "training": "failed", "nothing yet": "unknown"}
    assert {name: found["state"] for name, found in listed.items()} == states
    latest = read_latest(runs / "training")
    assert latest is not None and latest.status.last_step is not None
    figures = {"step": latest.status.step, "total_steps": latest.status.total_steps, "time": latest.time}
    simulated = {"accept_length": latest.status.last_step.accept_length, "measured": "train"}
    assert listed["training"] == {"name": "training", "kind": "dflash", "state": "failed", **figures, **simulated}
    assert (listed["stopped"]["accept_length"], listed["stopped"]["measured"]) == (1.75, "server")
    assert listed["nothing yet"]["kind"] == "eagle3" and listed["nothing yet"]["step"] is None
    RunFolder(runs / "training").handle.write_text(json.dumps(this_process()))
    (runs / "finished" / "metrics" / "latest.json").write_text('{"of": "another version"}')
    assert run(monkeypatch, "list", runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [word for line in lines if line.startswith("training") for word in line.split()][:3] == [
        *("training", "dflash", "live")
    ]
    assert any(line.startswith("stopped") and "1.75 server" in line and line.endswith(" ago") for line in lines)
    assert any(line.startswith("finished") and "unknown" in line for line in lines)
    assert run(monkeypatch, "list", "elsewhere") == 0
    assert capsys.readouterr().out == "no runs in elsewhere/\n"


@pytest.fixture
def logged(old_run: Path) -> Path:
    log = RunFolder(old_run).log("worker-0")
    log.parent.mkdir()
    log.write_text("".join(f"line {i}\n" for i in range(10_000)))
    RunFolder(old_run).log("controller").touch()
    return log


def test_logs_are_shown_in_whole_in_part_and_by_name(
    logged: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    assert run(monkeypatch, "logs", "old", "worker-0") == 0
    assert capfd.readouterr().out == logged.read_text()
    assert run(monkeypatch, "logs", "old", "worker-0", "-n", "2", "-f") == 0, "what has ended has nothing to follow"
    assert capfd.readouterr().out == "line 9998\nline 9999\n"
    assert run(monkeypatch, "logs", "old") == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == ["controller", "worker-0"]
    assert run(monkeypatch, "logs", "old", "worker-1") == 2
    assert capfd.readouterr().err == "error: runs/old has no log worker-1; it has controller, worker-0\n"


def test_a_log_is_followed_until_its_run_ends_or_somebody_has_seen_enough(logged: Path, old_run: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    handle = this_process() | {"pid": driver.pid}
    handle["started"] = int(Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()[19])
    RunFolder(old_run).handle.write_text(json.dumps(handle))
    try:
        followers = [command("logs", "old", "worker-0", "-f", "-n", "1", start_new_session=True) for _ in range(2)]
        for follower in followers:
            assert follower.stdout is not None and follower.stdout.readline() == "line 9999\n"
        with logged.open("a") as file:
            file.write("news\n")
        for follower in followers:
            assert follower.stdout is not None and follower.stdout.readline() == "news\n"
        tail = subprocess.run(["pgrep", "-g", str(followers[0].pid)], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-INT", *tail], check=True)
        assert followers[0].wait(10) == 130 and followers[0].communicate()[1] == ""
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert followers[1].wait(10) == 0
    finally:
        driver.kill()


def test_a_pipe_that_closes_early_is_no_error(logged: Path) -> None:
    process = command("logs", "old", "worker-0")
    assert process.stdout is not None and process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == "" and process.wait(10) == 0


def test_a_run_is_removed_after_a_question_and_never_while_it_runs(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "rm", "old", "--yes") == 2
    assert capsys.readouterr().err == "error: runs/old holds a config.yaml, but no run has been there\n"
    with RunFolder(old_run).hold():
        assert run(monkeypatch, "rm", "old", "--yes") == 2
        assert "is running already" in capsys.readouterr().err
    process = command("rm", "old", stdin=subprocess.PIPE)
    out, _ = process.communicate("n\n")
    assert process.returncode == 1 and "remove runs/old (" in out and old_run.exists()
    assert run(monkeypatch, "rm", "old", "--yes") == 0 and not old_run.exists()
