"""``torchspec train``, ``resume`` and ``plan``."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import ConfigFile, Overrides, Run, find_run
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


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    or_resume: OrResume = False,
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
    run_training(checked, resume)


def resume(run: Run, overrides: Overrides = None) -> None:
    """Continue a run from its latest checkpoint, with the config that it was started with."""
    from torchspec.config.load import load_config

    folder = find_run(run)
    config = load_config(RunFolder(folder).config, [f"run.dir={folder.absolute().parent}", *(overrides or [])])
    if config.run_dir != folder.absolute():
        raise ValueError(
            f"a run continues in its own folder {folder}, not in {config.run_dir}: leave run.dir and run.name alone"
        )
    run_training(config, resume=True)


def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say what CONFIG needs and does (data, steps, actors, store, memory) without starting anything."""
    from rich.console import Console

    from torchspec.cli.tables import plan_table
    from torchspec.config.load import load_config
    from torchspec.driver.prepare import make_plan_for

    checked = load_config(config, overrides or [])
    Console().print(plan_table(*make_plan_for(checked), checked.training))


def run_training(config: Config, resume: bool) -> RunSummary:
    """Train with a view, then print the summary. Exits with 1, with the reason, if the run fails."""
    from rich.console import Console

    from torchspec.cli.live import open_view
    from torchspec.cli.tables import summary_table
    from torchspec.driver import run
    from torchspec.driver.supervise import RunFailed

    try:
        with closing(open_view(config.monitor)) as view:
            summary = run.train(config, resume=resume, view=view)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    Console(highlight=False).print(summary_table(summary, config.target.path))
    return summary
