"""``torchspec status`` and ``stop``: a running run, seen from another terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from torchspec.cli.arguments import Run, find_run


def status(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")] = False
) -> None:
    """Show how a running run is doing."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from torchspec.cli.dashboard import Dashboard
    from torchspec.driver.handle import connect

    with connect(find_run(run)) as handle:
        now = handle.status()
    if as_json:
        print(json.dumps(asdict(now), indent=2))
    else:
        Console(highlight=False).print(Dashboard(now, now.messages))


def stop(run: Run) -> None:
    """Ask a running run to stop: it ends its current step, saves a checkpoint and cleans up."""
    from torchspec.driver.handle import connect

    folder = find_run(run)
    with connect(folder) as handle:
        handle.stop()
    print(f"{folder} stops after its current step and saves a checkpoint; continue it with: torchspec resume {folder}")
