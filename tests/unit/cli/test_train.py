"""``train``, ``resume`` and ``plan``: what they hand on, how they end."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.unit.cli.commands import run
from torchspec.config.load import load_config, save_config


@pytest.mark.parametrize("started", [False, True])
def test_or_resume_continues_what_has_been_started(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    monkeypatch.chdir(recipe.parent)
    resumed: list[bool] = []
    monkeypatch.setattr("torchspec.cli.train.run_training", lambda config, resume: resumed.append(resume))
    config = load_config(recipe)
    if started:
        config.run_dir.mkdir(parents=True)
        save_config(config, config.run_dir / "config.yaml")
    assert run(monkeypatch, "train", str(recipe), "--or-resume") == 0
    assert run(monkeypatch, "train", str(recipe), "--resume") == 0
    assert resumed == [started, True]


def test_resume_stays_in_the_runs_folder(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "resume", "old") == 2
    assert "continues in its own folder" in capsys.readouterr().err


def test_a_failed_run_is_exit_code_1_and_a_finished_one_prints_its_summary(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """How the command ends, for both ends of a run; the runs themselves are other tests' business."""
    from torchspec.driver import run as driver
    from torchspec.driver.supervise import RunFailed

    def fails(config: object, *, resume: bool, view: object, start: str) -> driver.RunSummary:
        raise RunFailed("trainer rank 0 failed: out of memory")

    monkeypatch.setattr(driver, "train", fails)
    assert run(monkeypatch, "train", recipe) == 1
    assert capsys.readouterr().err == "error: trainer rank 0 failed: out of memory\n"

    def ends(config: object, *, resume: bool, view: object, start: str) -> driver.RunSummary:
        assert resume
        return driver.RunSummary(tmp_path, 12, 48, 1, 75.0, False, None, tmp_path, None, None)

    monkeypatch.setattr(driver, "train", ends)
    assert run(monkeypatch, "train", recipe, "--resume") == 0
    out = capsys.readouterr().out
    assert "48 trained, 1 rejected" in out and "1m15s" in out


def test_the_address_option_sets_the_cluster(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.driver import run as driver
    from torchspec.driver.supervise import RunFailed

    addresses = []

    def notes(config: object, *, resume: bool, view: object, start: str) -> None:
        addresses.append(config.cluster.address)  # type: ignore[attr-defined]
        raise RunFailed("seen")

    monkeypatch.setattr(driver, "train", notes)
    run(monkeypatch, "train", recipe, "--address", "10.0.0.7:6379")
    run(monkeypatch, "train", recipe)
    assert addresses == ["10.0.0.7:6379", None]


def test_the_plan_counts_the_data_and_refuses_a_bad_file(
    recipe: Path, target_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe.with_name("data.jsonl")
    data.write_text('{"prompt": "Hi"}\n' * 9)
    changes = [f"target.path={target_path}", f"data.train={data}", f"data.cache_dir={recipe.parent}"]
    assert run(monkeypatch, "plan", recipe, *changes, "training.batch_size=4", "training.epochs=2") == 0
    out = capsys.readouterr().out
    assert "9 conversations of " in out and "5 of 4 samples" in out
    assert "1 x 1 (configured)" in out and "1 x 8" in out and "2 x 1" not in out
    assert set(recipe.parent.iterdir()) == {recipe, data}, "nothing is written"
    assert run(monkeypatch, "plan", recipe, *changes, "training.batch_size=4", "training.epochs=2", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["steps"] == 5 and known["data"]["rows"] == 9 and known["splits"][0]["configured"] is True
    data.write_text('{"prompt": "Hi"}\n{"prompt": 3}\n')
    assert run(monkeypatch, "plan", recipe, *changes) == 0
    assert "1 rejected: content is not text (data:2)" in capsys.readouterr().out
    data.write_text('{"prompt": "Hi"}\n{"prompt"\n')
    assert run(monkeypatch, "plan", recipe, *changes) == 2
    assert f"error: {data}:2: not valid JSON: " in capsys.readouterr().err
    assert run(monkeypatch, "plan", recipe, *changes, "data.train=absent.jsonl") == 2
    missing = f"{Path('absent.jsonl').absolute()}: no such file, and no file matches it as a glob"
    assert capsys.readouterr().err == f"error: data.train {missing}\n"


def test_the_plan_refuses_splits_that_cannot_be(
    recipe: Path, target_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [f"target.path={target_path}", "training.sp_ulysses_size=2"]
    assert run(monkeypatch, "plan", recipe, *base, "training.attention_backend=usp") == 2
    assert (
        "error: training.sp_ulysses_size=2 does not divide the draft's 9 query heads: choose one of 1, 3, 9, and make "
        "up the rest with training.sp_ring_size\n" in capsys.readouterr().err
    )
    assert run(monkeypatch, "plan", recipe, *base) == 2
    assert "need training.attention_backend=usp" in capsys.readouterr().err


def test_a_resume_goes_on_from_the_checkpoint_that_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.driver import run as driver
    from torchspec.driver.supervise import RunFailed

    monkeypatch.chdir(recipe.parent)
    config = load_config(recipe)
    config.run_dir.mkdir(parents=True)
    save_config(config, config.run_dir / "config.yaml")
    starts = []

    def notes(config: object, *, resume: bool, view: object, start: str) -> None:
        starts.append(start)
        raise RunFailed("seen")

    monkeypatch.setattr(driver, "train", notes)
    for named in ([], ["--from", "best"], ["--from", "40"]):
        assert run(monkeypatch, "resume", "run", *named) == 1
    assert starts == ["latest", "best", "40"]


BACKGROUND = """#!{python}
import json, os, sys, time
from pathlib import Path
from torchspec.run_folder import RunFolder, this_process
print(sys.argv[1:], os.getsid(0) == os.getpid(), sys.stdin.read(), flush=True)
time.sleep(1)
RunFolder(Path("runs/run")).handle.write_text(json.dumps(this_process()))
time.sleep(60)
"""


def test_a_detached_run_has_a_session_and_a_log_of_its_own(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program that it starts stands in for a run, which takes long to come up."""
    monkeypatch.chdir(recipe.parent)
    program = recipe.with_name("program")
    program.write_text(BACKGROUND.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setattr(sys, "executable", str(program))
    assert run(monkeypatch, "train", recipe, "--detach", "run.seed=3") == 0
    out = capsys.readouterr().out
    pid = int(out.partition("process ")[2].partition(";")[0])
    try:
        assert "torchspec top runs/run" in out and "torchspec stop runs/run" in out and out.endswith("is running\n")
        told = Path("runs/run/logs/driver.log").read_text()
        assert told == f"['-m', 'torchspec.cli.main', 'train', '{recipe}', 'run.seed=3'] True \n"
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_detached_run_that_does_not_come_up_says_why(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    program = recipe.with_name("program")
    program.write_text("#!/bin/sh\necho 'error: no room' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for _ in range(2):
        assert run(monkeypatch, "train", recipe, "--detach") == 2
        said = "error: no room\nruns/run has ended, with exit code 2\n"
        assert capsys.readouterr().err == said, "and not what was said before"
    program.write_text("#!/bin/sh\nkill -9 $$\n")  # as the kernel does where memory is short
    assert run(monkeypatch, "train", recipe, "--detach") == 137
    assert "was ended by SIGKILL before it ran\nruns/run has ended, with exit code 137\n" in capsys.readouterr().err
    save_config(load_config(recipe), Path("runs/run/config.yaml"))
    assert run(monkeypatch, "train", recipe, "--detach") == 2
    assert "the run runs/run exists already" in capsys.readouterr().err
