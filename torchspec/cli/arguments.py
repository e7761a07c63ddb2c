"""What several commands share: arguments and how they are completed, finding runs, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from torchspec.run_folder import RunFolder

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A recipe in YAML, or builtin:quickstart; torchspec init writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", show_default=False, help="Override the recipe, as in optimizer.lr=2e-3"),
]


def runs_in(folder: Path = Path("runs")) -> list[RunFolder]:
    """The runs that lie in ``folder``, by name."""
    return [run for run in map(RunFolder, sorted(folder.glob("*"))) if run.exists()]


def complete_run(incomplete: str) -> list[str]:
    """For the shell: names under ``runs/``, and paths of runs."""
    names = [run.path.name for run in runs_in()]
    return [word for word in (*names, *(f"runs/{name}" for name in names)) if word.startswith(incomplete)]


Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="The run's folder, or its name under runs/.", autocompletion=complete_run),
]
OptionalRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="The run's folder, or its name under runs/. Default: the one that was started last, of those that run.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")]


def print_json(tree: Any) -> None:
    """Everything that JSON does not know (paths) as text."""
    print(json.dumps(tree, indent=2, default=str))


def run_called(name: str | Path) -> RunFolder | None:
    """The run in that folder, or of that name under ``runs/``, if there is one."""
    return next((run for run in map(RunFolder, (Path(name), Path("runs", name))) if run.exists()), None)


def find_run(run: str) -> Path:
    """The folder of a run, given by path or by its name under ``runs/``.

    Raises:
        ValueError: neither is a run.
    """
    found = run_called(run)
    if found is None:
        raise ValueError(
            f"no run {run}: neither {Path(run)} nor {Path('runs', run)} has a config.yaml that can be read"
        )
    return found.path


def newest_run(runs: Path = Path("runs")) -> Path:
    """The folder of the run that was started last, of those that run now.

    Raises:
        ValueError: none runs.
    """
    started = [run for run in runs_in(runs) if run.handle.exists()]
    live = [run for run in sorted(started, key=lambda run: run.handle.stat().st_mtime) if run.is_live()]
    if not live:
        raise ValueError(f"no run is running in {runs}/: say which one to show, as in torchspec top runs/mine")
    return live[-1].path
