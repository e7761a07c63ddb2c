"""The command line: exit codes, error lines, and what it costs to start."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.unit.cli.commands import command, run
from torchspec.cli.main import app


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
        "init",
        "train",
        "resume",
        "plan",
        "list",
        "status",
        "logs",
        "rm",
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
        (["plan", "{recipe}"], "target.path: there is no folder models/absent"),
        (["resume", "absent"], "no run absent"),
        (["status", "absent"], "no run absent"),
        (["stop", "absent"], "no run absent"),
        (["scale", "absent", "--dp", "2"], "no run absent"),
        (["verify", "absent"], "no run absent"),
        (["export", "."], "neither a checkpoint"),
        (["eval", "."], "not an exported draft"),
        (["eval", "absent", "--target", "x"], "not an exported draft"),
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


ROOT = Path(__file__).parents[3]
COMMANDS = sorted(
    {
        line.partition("#")[0].strip(" \\")
        for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
        for block in re.findall(r"```\w*\n(.*?)```", path.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("torchspec ")
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_that_the_documents_show_are_understood(line: str) -> None:
    whole = typer.main.get_command(app)
    _, name, *words = shlex.split(line.replace("[DIR]", "runs"))
    with whole.make_context("torchspec", [name]) as context:
        command = whole.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, name
        command.make_context(name, words, parent=context)
