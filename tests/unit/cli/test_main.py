"""The command line: exit codes, error lines, and what it costs to start."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.cli.arguments import find_run
from torchspec.cli.main import main
from torchspec.cli.quickstart import unused_name
from torchspec.cli.tables import plan_table, summary_table
from torchspec.config.load import load_config, parse_config, save_config
from torchspec.config.schema import TrainingConfig
from torchspec.data.order import epoch_order
from torchspec.data.survey import Survey
from torchspec.driver.plan import Plan, ThreadPlan
from torchspec.driver.splits import Split
from torchspec.files import JsonLines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("target:\n  path: models/absent\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["torchspec", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def command(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    code = "from torchspec.cli.main import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes, **options)  # type: ignore[call-overload]


def test_importing_the_command_line_loads_no_heavy_package() -> None:
    heavy = {"torch", "ray", "transformers", "sglang", "mooncake", "pydantic", "matplotlib", "tensorboard", "numpy"}
    code = f"import sys, torchspec.cli.main; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_version_and_help() -> None:
    version = command("--version")
    assert version.communicate()[0].startswith("torchspec 0.") and version.returncode == 0
    text, _ = command("--help").communicate()
    for name in (
        "quickstart",
        "train",
        "resume",
        "plan",
        "status",
        "top",
        "ui",
        "trace",
        "stop",
        "verify",
        "export",
        "eval",
        "config",
        "doctor",
    ):
        assert f" {name} " in text


def test_an_empty_number_of_threads_is_none() -> None:
    code = "import sys, torchspec.cli.main as m; sys.argv[1:] = ['--help']\ntry: m.main()\nfinally: import torch"
    environment = {**os.environ, "OMP_NUM_THREADS": ""}
    complaints = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stderr
    plain = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, env=environment)
    assert "OMP_NUM_THREADS" in plain.stderr and complaints == ""


def test_a_config_error_in_a_real_process_is_a_line_and_exit_code_2(recipe: Path) -> None:
    process = command("train", recipe, "traning.epochs=3", "run.seed=-1")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "error: unknown key traning: did you mean training?" in lines


def test_ctrl_c_is_exit_code_130(tmp_path: Path) -> None:
    fifo = tmp_path / "recipe.yaml"
    os.mkfifo(fifo)
    process = command("config", fifo)
    with fifo.open("w"):  # returns once the command reads, and it waits for text now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "cannot read the config absent.yaml"),
        (["plan", "{recipe}"], "target.path models/absent is not a Hugging Face checkpoint"),
        (["resume", "absent"], "no run absent"),
        (["status", "absent"], "no run absent"),
        (["stop", "absent"], "no run absent"),
        (["scale", "absent", "--dp", "2"], "no run absent"),
        (["verify", "absent"], "no run absent"),
        (["export", "."], "neither a checkpoint"),
        (["eval", "."], "name the target"),
        (["eval", ".", "--target", "x", "--tokens", "0"], "num_draft_tokens is 0"),
        (["eval", ".", "--target", "x"], "not an exported draft"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_without_a_traceback(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert run(monkeypatch, *[a.format(recipe=recipe) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["train"], ["train", "recipe.yaml", "--bogus"], ["nonsense"]])
def test_wrong_usage_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert run(monkeypatch, *arguments) == 2


def test_a_run_that_is_over_cannot_be_asked(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs/old")
    folder.mkdir(parents=True)
    save_config(load_config(recipe), folder / "config.yaml")
    assert find_run("old") == find_run("runs/old") == folder
    for arguments in (["stop", "old"], ["scale", "old", "--inference", "2"]):
        assert run(monkeypatch, *arguments) == 2
        assert "is not running now" in capsys.readouterr().err
    for name, reason in (("status", "has no metrics"), ("trace", "no sample")):
        assert run(monkeypatch, name, "old") == 2
        assert reason in capsys.readouterr().err
    assert run(monkeypatch, "scale", "old") == 2
    assert "--inference K, --dp D, --sp N" in capsys.readouterr().err


def test_verify_says_how_far_a_run_is_proven_and_names_what_is_not(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs/old")
    folder.mkdir(parents=True)
    save_config(load_config(recipe), folder / "config.yaml")
    assert run(monkeypatch, "verify", "old") == 1
    assert "the journal is empty" in capsys.readouterr().out
    (first, second, third), others = epoch_order(5, 0, 8)[:3].tolist(), {"max_steps": None, "epochs": 1}
    shape = {"dataset": "d", "prompts": 8, "batch_size": 2, "seed": 5}
    journal = JsonLines(folder / "ledger.jsonl")
    journal.write({"event": "started", **shape, **others})
    journal.write({"event": "trained", "step": 1, "end": 2, "samples": [[0, first], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 0
    assert "proven, so far: 1 steps" in capsys.readouterr().out
    journal.write({"event": "trained", "step": 2, "end": 4, "samples": [[0, third], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 1
    assert f"line 3: step 2 trains a second time e0p{second}" in capsys.readouterr().out


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
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs/renamed")
    folder.mkdir(parents=True)
    save_config(load_config(recipe, ["run.name=original"]), folder / "config.yaml")
    assert run(monkeypatch, "resume", "renamed") == 2
    assert "continues in its own folder" in capsys.readouterr().err


def test_config_prints_the_resolved_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "config", recipe, "optimizer.lr=2e-3") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(recipe, ["optimizer.lr=2e-3"])


def test_every_quickstart_is_a_new_run(tmp_path: Path) -> None:
    config = parse_config({"target": {"path": "x"}, "run": {"name": "quick", "dir": str(tmp_path)}})
    names = []
    for _ in range(3):
        names.append(unused_name(config))
        (tmp_path / names[-1]).mkdir()
        (tmp_path / names[-1] / "config.yaml").touch()
    assert names == ["quick", "quick-2", "quick-3"]


def test_a_failed_run_is_exit_code_1_and_a_finished_one_prints_its_summary(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """How the command ends, for both ends of a run; the runs themselves are other tests' business."""
    from torchspec.driver import run as driver
    from torchspec.driver.supervise import RunFailed

    def fails(config: object, *, resume: bool, view: object) -> driver.RunSummary:
        raise RunFailed("trainer rank 0 failed: out of memory")

    monkeypatch.setattr(driver, "train", fails)
    assert run(monkeypatch, "train", recipe) == 1
    assert capsys.readouterr().err == "error: trainer rank 0 failed: out of memory\n"

    def ends(config: object, *, resume: bool, view: object) -> driver.RunSummary:
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

    def notes(config: object, *, resume: bool, view: object) -> None:
        addresses.append(config.cluster.address)  # type: ignore[attr-defined]
        raise RunFailed("seen")

    monkeypatch.setattr(driver, "train", notes)
    run(monkeypatch, "train", recipe, "--address", "10.0.0.7:6379")
    run(monkeypatch, "train", recipe)
    assert addresses == ["10.0.0.7:6379", None]


def rendered(renderable: object, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


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
    data.write_text('{"prompt": "Hi"}\n{"prompt": 3}\n')
    assert run(monkeypatch, "plan", recipe, *changes) == 2
    assert f"error: {data}:2: prompt is not text\n" in capsys.readouterr().err
    assert run(monkeypatch, "plan", recipe, *changes, "data.train=absent.jsonl") == 2
    assert capsys.readouterr().err == "error: data.train absent.jsonl: no such file, and no file matches it as a glob\n"


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


def test_the_plan_warns_when_memory_is_short() -> None:
    splits = (
        Split(1, 1, 2, 3 << 30, 1500, "memory", configured=True),
        Split(2, 1, 4, 2 << 30, 3000, "", configured=False),
        Split(1, 8, 16, 1 << 30, 9000, "16 GPUs, 6 are left", configured=False),
    )

    def plan(memory: int, splits: tuple[Split, ...] = ()) -> Plan:
        return Plan(
            actors=(("inference worker", 2, "1 CPU threads"),),
            threads=ThreadPlan(1, 1),
            cores=2,
            tokens_per_sample=2048,
            sample_bytes=9_445_376,
            credit_bytes=900 << 20,
            store_samples=99,
            draft_parameters=9_800_000,
            memory_bytes=memory,
            memory_available=16 << 30,
            splits=splits,
        )

    data = Survey(90, 12_345, 6_789, (("p7", "too long"), ("p8", "too short")), exact=True)
    training = TrainingConfig(epochs=2, batch_size=8)
    fits, short = (rendered(plan_table(plan(size << 30), data, training)) for size in (10, 20))
    assert "90 conversations of 12,345 tokens, and up to 6,789 that the target answers" in fits
    assert "2 rejected (p7: too long, ...)" in " ".join(fits.replace("│", " ").split())
    assert "23 of 8 samples" in fits
    assert "2,048 tokens, 9.0 MiB" in fits and "99 samples" in fits and "9.8M" in fits
    assert "about 10.0 GiB of 16.0 GiB" in fits
    assert "more than the machine has" in short and "more than the machine has" not in fits
    shared = rendered(plan_table(plan(10 << 30, splits), data, training))
    assert "more than the machine has" in shared and "a sample of 2,048 tokens" in shared
    rows = [" ".join(line.replace("│", " ").split()) for line in shared.splitlines()]
    assert "1 x 1 (configured) 2 3.0 GiB 1,500 tokens no: memory" in rows
    assert "2 x 1 4 2.0 GiB 3,000 tokens yes" in rows
    assert "1 x 8 16 1.0 GiB 9,000 tokens no: 16 GPUs, 6 are left" in rows


def test_the_summary_names_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.driver.run import RunSummary

    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "mine"
    export, checkpoint = run_dir / "export", run_dir / "checkpoints" / "step_000012"
    for folder in (export, checkpoint):
        folder.mkdir(parents=True)
    for stopped, exported, expected in (
        (False, export, "next: torchspec eval runs/mine/export --target models/x"),
        (False, None, "next: torchspec export runs/mine/checkpoints/step_000012"),
        (True, export, "next: torchspec resume runs/mine"),
    ):
        summary = RunSummary(run_dir, 12, 48, 0, 75.0, stopped, checkpoint, exported, None, None)
        text = rendered(summary_table(summary, "models/x"))
        assert expected in text and "runs/mine/checkpoints/step_000012" in text
