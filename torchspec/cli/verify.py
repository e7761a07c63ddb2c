"""``torchspec verify``: nothing lost, nothing twice, as the run's own journal proves."""

from __future__ import annotations

import typer

from torchspec.cli.arguments import Run, find_run

SHOWN = 10
"""Violations that are printed; one mistake often shows in many lines."""


def verify(run: Run) -> None:
    """Prove from a run's journal that no sample was lost or trained twice, and that batches follow the seed.

    Exit code 0: proven, for a run that has not finished as far as it got. 1: violations, the first of them named.
    """
    from rich.console import Console
    from rich.text import Text

    from torchspec.cli.tables import proof_table
    from torchspec.controller.verify import verify_run

    folder = find_run(run)
    proof = verify_run(folder)
    console = Console(highlight=False)
    console.print(proof_table(folder.name, proof))
    if not proof.proven:
        console.print(Text(f"not proven: {len(proof.violations)} violations", style="bold red"))
        for violation in proof.violations[:SHOWN]:
            console.print(Text(f"  {violation}", style="red"))
        raise typer.Exit(1)
    extent = "all of it" if proof.finished else "so far"
    resumes = f", resumed {proof.resumes} times" if proof.resumes else ""
    console.print(
        Text(
            f"proven, {extent}: {proof.steps:,} steps in the seeded order{resumes}; no sample lost, none twice",
            style="bold green",
        )
    )
