"""``torchspec status``, ``top``, ``ui``, ``trace``, ``scale``, ``stop``, ``verify``: a run, from another terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import AsJson, OptionalRun, Run, find_run, newest_run, print_json
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.contracts import RunStatus

VIOLATIONS_SHOWN = 10
"""One mistake often shows in many."""


def status(run: Run, as_json: AsJson = False) -> None:
    """Show how a run is doing, or how it ended: its health, which side limits it, by how much, what to change."""
    import time
    from dataclasses import asdict

    from rich.console import Console

    from torchspec.cli.dashboard import Dashboard
    from torchspec.cli.tables import health_text, verdict_text
    from torchspec.monitor.bottleneck import judge_run
    from torchspec.monitor.health import assess_run
    from torchspec.monitor.snapshot import read_latest

    folder = find_run(run)
    live, latest = RunFolder(folder).is_live(), read_latest(folder)
    now = latest.status if latest is not None else _ask_status(folder, live)
    health, verdict = assess_run(folder, latest, live, time.time()), judge_run(folder, live)
    if as_json:
        seen = {"live": live, "time": latest.time if latest is not None else time.time()}
        print_json({**asdict(now), **seen, "health": asdict(health), "verdict": asdict(verdict)})
        return
    console = Console(highlight=False)
    console.print(Dashboard(now, now.messages))
    console.print(health_text(health))
    console.print(verdict_text(verdict))
    if not live and now.phase not in ("finished", "stopped"):
        console.print(f"not running now; continue it with: torchspec resume {folder}", style="yellow")


def _ask_status(folder: Path, live: bool) -> RunStatus:
    """Where monitoring is switched off, the running run itself is asked."""
    from torchspec.driver.remote import connect

    if not live:
        raise ValueError(f"{folder} has ended and has no metrics (monitor.history_seconds was 0?)")
    with connect(folder) as handle:
        return handle.status()


def top(run: OptionalRun = None) -> None:
    """Watch a run on the whole terminal: pools, queues, store, curves, workers, ranks and events. Keys: press ?."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(
            "torchspec top draws on a terminal, and this is none: use torchspec status RUN, or --json there"
        )
    from torchspec.cli.top_app import TopApp

    TopApp(newest_run() if run is None else find_run(run)).run()


def ui(
    run: Run,
    other: Annotated[str | None, typer.Argument(metavar="[RUN2]", help="Another run, to compare with.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8790, or a free one.", show_default=False)] = None,
) -> None:
    """Serve the page of a run on loopback, running or not; Ctrl-C ends it."""
    import asyncio

    from torchspec.driver.remote import PageControls
    from torchspec.monitor.server import PageServer, ensure_token, token_hint

    folders = [find_run(name) for name in (run, other) if name is not None]
    server = PageServer(folders, PageControls, port)
    for folder in folders:
        ensure_token(folder)

    async def serve() -> None:
        runner = await server.start()
        try:
            print(server.url + token_hint(folders[0]), flush=True)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    asyncio.run(serve())


def trace(
    run: Run,
    sample: Annotated[
        str | None, typer.Argument(metavar="[SAMPLE]", help="Like e0p12. Default: all that were followed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: trace.json in the run's folder.", show_default=False)
    ] = None,
) -> None:
    """Write the way of samples through the system as a trace for chrome://tracing or ui.perfetto.dev."""
    from torchspec.cli.tables import shown
    from torchspec.monitor.trace import write_trace

    folder = find_run(run)
    path = out or RunFolder(folder).trace
    count = write_trace(folder, sample, path)
    print(f"{count} sample{'' if count == 1 else 's'} traced in {shown(path)}; open it at https://ui.perfetto.dev")


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
    from torchspec.driver.remote import connect
    from torchspec.driver.scale import checked_change

    folder = find_run(run)
    if inference is None and {dp, sp, sp_ulysses, sp_ring} == {None}:
        raise ValueError("say what to change: --inference K, --dp D, --sp N (with --sp-ulysses U or --sp-ring R)")
    with connect(folder) as handle:
        change = checked_change(folder, inference, dp, sp, sp_ulysses, sp_ring)
        if change.workers is not None:
            handle.scale_inference(change.workers)
            print(f"{folder}: inference workers: {change.workers}")
        if change.sizes is not None:
            handle.scale_training(change.sizes)
            shown = ", ".join(f"{name} {size}" for name, size in change.sizes.items())
            print(f"{folder}: training goes on from its next checkpoint with {shown}")


def stop(run: Run) -> None:
    """Ask a running run to stop: it ends its current step, saves a checkpoint and cleans up."""
    from torchspec.driver.remote import connect

    folder = find_run(run)
    with connect(folder) as handle:
        handle.stop()
    print(f"{folder} stops after its current step and saves a checkpoint; continue it with: torchspec resume {folder}")


def verify(run: Run, as_json: AsJson = False) -> None:
    """Prove from a run's journal that no sample was lost or trained twice, and that batches follow the seed.

    Exit code 0: proven, for a run that has not finished as far as it got. 1: violations, the first of them named.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from torchspec.cli.tables import proof_table
    from torchspec.controller.verify import verify_run

    folder = find_run(run)
    proof = verify_run(folder)
    if as_json:
        print_json({"proven": proof.proven, **asdict(proof)})
        raise typer.Exit(0 if proof.proven else 1)
    console = Console(highlight=False)
    console.print(proof_table(folder.name, proof))
    if not proof.proven:
        console.print(Text(f"not proven: {len(proof.violations)} violations", style="bold red"))
        for violation in proof.violations[:VIOLATIONS_SHOWN]:
            console.print(Text(f"  {violation}", style="red"))
        raise typer.Exit(1)
    extent = "all of it" if proof.finished else "so far"
    resumes = f", resumed {proof.resumes} times" if proof.resumes else ""
    proven = f"proven, {extent}: {proof.steps:,} steps in the seeded order{resumes}; no sample lost, none twice"
    console.print(Text(proven, style="bold green"))
