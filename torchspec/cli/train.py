"""``torchspec train``, ``resume`` and ``plan``."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import AsJson, ConfigFile, Overrides, Run, find_run, print_json
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.config.schema import Config
    from torchspec.driver.run import RunSummary

Address = Annotated[
    str | None, typer.Option(help="Join this Ray cluster (auto, host:port), do not start one.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its latest checkpoint.")]
OrResume = Annotated[
    bool, typer.Option("--or-resume", help="Start the run, or continue it if it has been started: for job schedulers.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Run in the background; it goes on when this terminal is closed.")
]
From = Annotated[str, typer.Option("--from", metavar="STEP|best|latest", help="The checkpoint to go on from.")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    or_resume: OrResume = False,
    detach: Detach = False,
) -> None:
    """Train a draft as CONFIG says. Ctrl-C once stops with a checkpoint, twice at once."""
    from torchspec.config.load import load_config
    from torchspec.driver.scale import sizes_so_far

    changes = list(overrides or [])
    if address is not None:
        changes.append(f"cluster.address={address}")
    checked = load_config(config, changes)
    resume = resume or or_resume
    if resume and RunFolder(checked.run_dir).exists():
        checked = load_config(config, [*sizes_so_far(checked.run_dir), *changes])
    elif or_resume:
        resume = False
    (run_detached if detach else run_training)(checked, resume)


def resume(run: Run, overrides: Overrides = None, start: From = "latest", detach: Detach = False) -> None:
    """Continue a run from a checkpoint, with the config that it was started with."""
    from torchspec.config.load import load_config

    folder = find_run(run)
    config = load_config(RunFolder(folder).config, [f"run.dir={folder.absolute().parent}", *(overrides or [])])
    if config.run_dir != folder.absolute():
        raise ValueError(
            f"a run continues in its own folder {folder}, not in {config.run_dir}: leave run.dir and run.name alone"
        )
    if detach:
        run_detached(config, resume=True)
    else:
        run_training(config, resume=True, start=start)


def plan(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what CONFIG needs and does (data, steps, actors, store, memory) without starting anything."""
    from dataclasses import asdict

    from rich.console import Console

    from torchspec.cli.tables import plan_table
    from torchspec.config.load import load_config
    from torchspec.driver.prepare import make_plan_for

    checked = load_config(config, overrides or [])
    figures, data = make_plan_for(checked)
    if as_json:
        print_json({"steps": checked.training.total_steps(data.rows), **asdict(figures), "data": asdict(data)})
    else:
        Console().print(plan_table(figures, data, checked.training))


def run_training(config: Config, resume: bool, start: str = "latest") -> RunSummary:
    """Train with a view, then print the summary. Exits with 1, with the reason, if the run fails."""
    from rich.console import Console

    from torchspec.cli.live import open_view, outlive_readers
    from torchspec.cli.tables import summary_table
    from torchspec.driver import run
    from torchspec.driver.supervise import RunFailed

    outlive_readers()
    try:
        with open_view(config.monitor) as view:
            summary = run.train(config, resume=resume, view=view, start=start)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    Console(highlight=False).print(summary_table(summary))
    return summary


def run_detached(config: Config, resume: bool) -> None:
    """This very command once more, in a session of its own, which no terminal ends. Returns once the run is up.

    Exits as that command does, with what it said, if it ends before: as a shell does (128 and more) after a signal.
    """
    from torchspec.cli.tables import shown

    run = RunFolder(config.run_dir)
    run.expect(resume)
    folder, log = shown(run.path), run.log("driver")
    run.make()
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torchspec.cli.main", *(word for word in sys.argv[1:] if word != "--detach")]
    with log.open("ab") as file:
        begin = file.tell()
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(
        f"starting in the background as process {driver.pid}; this waits until it runs, and may be interrupted\n"
        f"  watch it:  torchspec top {folder}\n"
        f"  its log:   torchspec logs {folder} driver -f   ({shown(log)})\n"
        f"  stop it:   torchspec stop {folder}",
        flush=True,
    )
    while driver.poll() is None:
        if run.is_live() and run.read_handle()["pid"] == driver.pid:
            print(f"{folder} is running")
            return
        time.sleep(0.2)
    code = driver.returncode
    with log.open("rb") as file:
        file.seek(begin)
        print(file.read().decode(errors="replace"), end="", file=sys.stderr if code else sys.stdout)
    if code < 0:
        print(f"error: process {driver.pid} was ended by {signal.Signals(-code).name} before it ran", file=sys.stderr)
        code = 128 - code
    print(f"{folder} has ended, with exit code {code}", file=sys.stderr)
    raise typer.Exit(code)
