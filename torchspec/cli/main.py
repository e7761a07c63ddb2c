"""Entry point of the ``torchspec`` command.

Exit codes: 0 done, 1 the run or a check failed, 2 the user's mistake (one ``error:`` line for each thing that is
wrong, no traceback), 130 interrupted. Importing this module needs neither torch nor ray, so ``--help`` is instant.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from torchspec.cli import data, doctor, export_eval, folders, init, quickstart, reference, runs, train
from torchspec.data.conversations import printable

NAMES = {export_eval.evaluate: "eval", folders.list_runs: "list", folders.remove: "rm"}
"""Of commands that Python has another word for."""

app = typer.Typer(
    name="torchspec",
    help="Train drafts for speculative decoding online: SGLang produces the target's hidden states while torch trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    quickstart.quickstart,
    init.init,
    train.train,
    train.resume,
    train.plan,
    data.data,
    folders.list_runs,
    runs.status,
    runs.ui,
    runs.top,
    folders.logs,
    runs.trace,
    runs.scale,
    runs.stop,
    runs.verify,
    folders.remove,
    export_eval.export,
    export_eval.evaluate,
    reference.config,
    doctor.doctor,
):
    app.command(name=NAMES.get(command))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"torchspec {version('torchspec')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line and exit."""
    if os.environ.get("OMP_NUM_THREADS") == "":  # to OpenMP, every process of a run would complain of it
        del os.environ["OMP_NUM_THREADS"]
    try:
        app()
    except ValueError as error:
        for line in str(error).split("\n"):
            print(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
