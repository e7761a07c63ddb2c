"""``torchspec list``, ``logs`` and ``rm``: runs as the folders that they are, whether or not they run."""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import AsJson, Run, find_run, print_json, runs_in
from torchspec.cli.units import human_bytes, human_seconds
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.contracts import RunStatus


@dataclass(frozen=True)
class ListedRun:
    """A run in a line; None for what it has not come to yet, or what this torchspec cannot read."""

    name: str
    kind: str
    """Of its draft."""
    state: str
    """``live``, ``finished``, ``stopped``, ``failed`` (it ended otherwise, maybe without a word), or ``unknown``."""
    step: int | None
    total_steps: int | None
    accept_length: float | None
    measured: str | None
    """How: in a ``server``, or simulated on ``held-out`` or ``train`` samples."""
    time: float
    """Of its last sign of life, in seconds since the epoch."""


def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where runs lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs: how each is doing or how it ended, how far it got, how good its draft is. The newest comes last."""
    from rich.console import Console

    runs = sorted(map(_look_at, runs_in(folder)), key=lambda run: run.time)
    if as_json:
        print_json([asdict(run) for run in runs])
    elif runs:
        Console(highlight=False).print(_table(runs, time.time()))
    else:
        print(f"no runs in {folder}/")


def _look_at(run: RunFolder) -> ListedRun:
    import yaml

    from torchspec.drafts.registry import kind_of
    from torchspec.monitor.snapshot import read_latest

    live = run.is_live()
    kind = kind_of(yaml.safe_load(run.config.read_text()).get("draft"))
    try:
        latest = read_latest(run.path)
    except ValueError:  # of another version
        latest = None
    if latest is None:
        state = "live" if live else "unknown"
        return ListedRun(run.path.name, kind, state, None, None, None, None, run.config.stat().st_mtime)
    status, measured = latest.status, latest.measured_accept_length
    state = "live" if live else status.phase if status.phase in ("finished", "stopped") else "failed"
    accept = ("server", measured) if measured is not None else _simulated(status)
    return ListedRun(run.path.name, kind, state, status.step, status.total_steps, accept[1], accept[0], latest.time)


def _simulated(status: RunStatus) -> tuple[str | None, float | None]:
    for how, report in (("held-out", status.last_heldout), ("train", status.last_step)):
        if report is not None:
            return how, report.accept_length
    return None, None


def _table(runs: list[ListedRun], now: float) -> object:
    from rich.table import Table
    from rich.text import Text

    styles = {"live": "green", "finished": "", "stopped": "yellow", "failed": "red", "unknown": "dim"}
    table = Table("run", "draft", "state", "step", "accept length", "last sign", box=None, pad_edge=False)
    for run in runs:
        accept = "-" if run.accept_length is None else f"{run.accept_length:.2f} {run.measured}"
        step = "-" if run.step is None else f"{run.step:,} of {run.total_steps:,}"
        state = Text(run.state, style=styles[run.state])
        table.add_row(run.name, run.kind, state, step, accept, f"{human_seconds(max(0, now - run.time))} ago")
    return table


def logs(
    run: Run,
    name: Annotated[
        str | None, typer.Argument(metavar="[LOG]", help="Like worker-0. Default: say which there are.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on while the run does, or until Ctrl-C.")] = False,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", min=0, help="Only the last so many.", show_default=False)
    ] = None,
) -> None:
    """Show what a part of a run wrote: controller, worker-N, trainer-N, the store's; driver, if it was detached."""
    folder = RunFolder(find_run(run))
    there = folder.logs()
    if name is None:
        for known, path in there.items():
            print(f"{known:<18} {human_bytes(path.stat().st_size):>10}  {path}")
        return
    if name not in there:
        raise ValueError(f"{folder.path} has no log {name}; it has {', '.join(there) or 'none'}")
    command = ["tail", "-n", "+1" if lines is None else str(lines)]
    if follow and folder.is_live():
        command += ["-f", f"--pid={folder.read_handle()['pid']}"]
    subprocess.run([*command, str(there[name])])


def remove(run: Run, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove a run's folder with its checkpoints, drafts and answers, unless it runs."""
    import shutil

    folder = RunFolder(find_run(run))
    if not folder.lock.exists():
        raise ValueError(f"{folder.path} holds a config.yaml, but no run has been there")
    with folder.hold():
        if not yes:
            size = sum(path.lstat().st_size for path in folder.path.rglob("*"))
            typer.confirm(f"remove {folder.path} ({human_bytes(size)})?", abort=True)
        shutil.rmtree(folder.path)
