"""``torchspec status``, ``scale`` and ``stop``: a running run, seen from another terminal."""

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


def scale(
    run: Run,
    inference: Annotated[
        str | None, typer.Option(metavar="K|auto", help="Inference workers; auto: as many as training needs.")
    ] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks.")] = None,
    sp: Annotated[int | None, typer.Option(min=1, help="Ranks that share a sample.")] = None,
    sp_ulysses: Annotated[int | None, typer.Option(min=1, help="Of these, ranks that split the heads.")] = None,
    sp_ring: Annotated[int | None, typer.Option(min=1, help="Of these, ranks in a ring.")] = None,
) -> None:
    """Change the size of a running run's pools; a resume goes on with the new sizes.

    Workers come and go without a pause. Training goes on from a checkpoint that is made at once, with the same batches.
    """
    from torchspec.driver.handle import connect
    from torchspec.driver.scale import checked_sizes, checked_workers

    folder = find_run(run)
    if inference is None and {dp, sp, sp_ulysses, sp_ring} == {None}:
        raise ValueError("say what to change: --inference K, --dp D, --sp N (with --sp-ulysses U or --sp-ring R)")
    with connect(folder) as handle:
        if inference is not None:
            handle.scale_inference(checked_workers(folder, inference))
            print(f"{folder}: inference workers: {inference}")
        if {dp, sp, sp_ulysses, sp_ring} != {None}:
            sizes = checked_sizes(folder, dp, sp, sp_ulysses, sp_ring)
            handle.scale_training(sizes)
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            print(f"{folder}: training goes on from its next checkpoint with {shown}")


def stop(run: Run) -> None:
    """Ask a running run to stop: it ends its current step, saves a checkpoint and cleans up."""
    from torchspec.driver.handle import connect

    folder = find_run(run)
    with connect(folder) as handle:
        handle.stop()
    print(f"{folder} stops after its current step and saves a checkpoint; continue it with: torchspec resume {folder}")
