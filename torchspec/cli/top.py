"""``torchspec top``: a run on the whole terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from torchspec.cli.arguments import find_run
from torchspec.run_folder import RunFolder

OptionalRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="The run's folder, or its name under runs/. Default: the one that was started last, of those that run.",
        show_default=False,
    ),
]


def top(run: OptionalRun = None) -> None:
    """Watch a run on the whole terminal: pools, queues, store, curves, workers, ranks and events. Keys: press ?."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(
            "torchspec top draws on a terminal, and this is none: use torchspec status RUN, or --json there"
        )
    from torchspec.cli.top_app import TopApp

    TopApp(newest_run() if run is None else find_run(run)).run()


def newest_run(runs: Path = Path("runs")) -> Path:
    """The folder of the run that was started last, of those that run now.

    Raises:
        ValueError: none runs.
    """
    started = [run for run in map(RunFolder, runs.glob("*")) if run.handle.exists()]
    live = [run for run in sorted(started, key=lambda run: run.handle.stat().st_mtime) if run.is_live()]
    if not live:
        raise ValueError(f"no run is running in {runs}/: say which one to show, as in torchspec top runs/mine")
    return live[-1].path
