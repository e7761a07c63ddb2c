"""``torchspec doctor``: checks the machine and says how to mend each thing."""

from __future__ import annotations

import typer

from torchspec.cli.arguments import AsJson, print_json


def doctor(as_json: AsJson = False) -> None:
    """Check this machine; exit with 1 if something would stop every run."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from torchspec.cli.checks import CHECKS

    console = Console(highlight=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    columns = Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=False)
    with Console(stderr=True).status("checking"):
        findings = {name: check() for name, check in CHECKS.items()}
    levels: list[str] = [finding.level for finding in findings.values()]
    if as_json:
        print_json({name: asdict(finding) for name, finding in findings.items()})
    else:
        for name, finding in findings.items():
            text = Text(finding.detail)
            if finding.fix:
                text.append(f"\nto fix: {finding.fix}", style="cyan")
            table.add_row(Text(finding.level, style=styles[finding.level]), name, text)
        console.print(table)
        console.print(Text(", ".join(f"{levels.count(level)} {level}" for level in styles), style="bold"))
    if "fail" in levels:
        raise typer.Exit(1)
