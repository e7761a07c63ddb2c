"""``torchspec doctor``: checks the machine and says how to mend each thing."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Check this machine; exit with 1 if something would stop every run."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from torchspec.cli.checks import CHECKS

    console = Console(highlight=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    columns = Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=False)
    counts = dict.fromkeys(styles, 0)
    with console.status("checking"):
        for name, check in CHECKS.items():
            finding = check()
            counts[finding.level] += 1
            text = Text(finding.detail)
            if finding.fix:
                text.append(f"\nto fix: {finding.fix}", style="cyan")
            table.add_row(Text(finding.level, style=styles[finding.level]), name, text)
    console.print(table)
    console.print(Text(", ".join(f"{count} {level}" for level, count in counts.items()), style="bold"))
    if counts["fail"]:
        raise typer.Exit(1)
