"""Tables that commands print at their end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torchspec.cli.units import human_bytes, human_count, human_seconds
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.config.schema import TrainingConfig
    from torchspec.controller.verify import Proof
    from torchspec.data.survey import Survey
    from torchspec.driver.plan import Plan
    from torchspec.driver.run import RunSummary
    from torchspec.monitor import bottleneck
    from torchspec.monitor.health import Health


def pairs_table(title: str, pairs: dict[str, str]) -> Table:
    """Names on the left, values on the right."""
    table = _framed(title)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.show_header = False
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table


def plan_table(plan: Plan, data: Survey, training: TrainingConfig) -> RenderableType:
    """What a run needs and does: its actors, then its figures."""
    from torchspec.driver.plan import total_steps

    actors = _framed("Actors")
    actors.add_column("role")
    actors.add_column("count", justify="right")
    actors.add_column("each uses")
    for role, count, uses in plan.actors:
        actors.add_row(role, str(count), uses)
    expected, available = human_bytes(plan.memory_bytes), human_bytes(plan.memory_available)
    figures = pairs_table(
        "Figures",
        {
            "data": _data_text(data),
            "steps": f"{total_steps(training, data.rows):,} of {training.batch_size} samples",
            "threads": f"{plan.threads.inference} an engine, {plan.threads.training} a rank, of {plan.cores} cores",
            "largest sample": f"{plan.tokens_per_sample:,} tokens, {human_bytes(plan.sample_bytes)} in the store",
            "store": f"{human_bytes(plan.credit_bytes)} of credits: {plan.store_samples:,} samples of the largest size",
            "draft": f"{human_count(plan.draft_parameters)} trained parameters",
            "memory": f"about {expected} of {available}",
        },
    )
    parts: list[RenderableType] = [actors, figures, _splits_table(plan)]
    if plan.memory_bytes > plan.memory_available or any(s.obstacle for s in plan.splits if s.configured):
        parts.append(
            Text(
                "This is more than the machine has: choose a split that fits, or lower store.segment_bytes, "
                "inference.workers, inference.max_total_tokens or data.max_seq_length.",
                style="yellow",
            )
        )
    return Group(*parts)


def _splits_table(plan: Plan) -> Table:
    table = _framed(f"Ranks that share a sample of {plan.tokens_per_sample:,} tokens")
    table.add_column("ulysses x ring")
    for name in ("ranks", "memory of each", "longest sample"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for split in plan.splits:
        fits = f"no: {split.obstacle}" if split.obstacle else "yes"
        table.add_row(
            f"{split.ulysses} x {split.ring}{' (configured)' if split.configured else ''}",
            str(split.ranks),
            human_bytes(split.rank_bytes),
            f"{split.longest:,} tokens",
            fits,
            style="bold" if split.configured else "",
        )
    return table


def _data_text(data: Survey) -> str:
    about = "" if data.exact else "about "
    text = f"{about}{data.rows:,} conversations of {data.tokens:,} tokens"
    if data.answer_tokens:
        text += f", and up to {data.answer_tokens:,} that the target answers"
    if data.rejected:
        name, reason = data.rejected[0]
        text += f"; {len(data.rejected):,} rejected{'' if data.exact else ' of a sample'} ({name}: {reason}"
        text += ", ...)" if len(data.rejected) > 1 else ")"
    return text


def summary_table(summary: RunSummary, target: str) -> RenderableType:
    """How a run ended, and the command that comes next."""
    pairs = {
        "steps": f"{summary.steps:,}",
        "samples": f"{summary.samples:,} trained, {summary.rejected:,} rejected",
        "time": human_seconds(summary.seconds),
    }
    reports = {"train": summary.last_step, "held-out": summary.last_heldout}
    measured = {split: report for split, report in reports.items() if report is not None}
    if measured:
        pairs["loss"] = ", ".join(f"{r.loss:.3f} {split}" for split, r in measured.items())
        simulated = ", ".join(f"{r.accept_length:.2f} {split}" for split, r in measured.items())
        pairs["accept length"] = f"{simulated} (simulated)"
    if summary.rejected:
        pairs["rejected"] = shown(RunFolder(summary.run_dir).rejected)
    for name, path in (
        ("checkpoint", summary.checkpoint),
        ("export", summary.export),
        ("curves", RunFolder(summary.run_dir).curves),
    ):
        if path is not None and path.exists():
            pairs[name] = shown(path)
    table = pairs_table(f"{summary.run_dir.name} {'stopped' if summary.stopped else 'finished'}", pairs)
    commands = Text("next: ", style="dim")
    if summary.stopped:
        commands.append(f"torchspec resume {shown(summary.run_dir)}", style="cyan not dim")
    elif summary.export is not None:
        commands.append(f"torchspec eval {shown(summary.export)} --target {target}", style="cyan not dim")
    else:
        commands.append(f"torchspec export {shown(summary.checkpoint or summary.run_dir)}", style="cyan not dim")
    return Group(table, commands)


def proof_table(title: str, proof: Proof) -> Table:
    """Where the samples of each epoch are."""
    table = _framed(f"{title}: step {proof.steps:,}, the last checkpoint has {proof.committed_step:,}")
    table.add_column("epoch", justify="right")
    for name in ("data set", "trained", "of these committed", "rejected", "not yet trained"):
        table.add_column(name, justify="right")
    for count in proof.epochs:
        figures = count.prompts, count.trained, count.committed, count.rejected, count.left
        table.add_row(str(count.epoch), *(f"{figure:,}" for figure in figures))
    return table


def health_text(health: Health) -> Text:
    """Whether a run is well, in words."""
    style = {"good": "green", "warning": "yellow", "bad": "red", "idle": "dim"}[health.level]
    return Text.assemble((health.headline, f"bold {style}"), f": {', '.join(health.text.splitlines())}")


def verdict_text(verdict: bottleneck.Verdict) -> Text:
    """Which side limits a run, in words."""
    style = {"balanced": "green", None: "dim"}.get(verdict.side, "yellow")
    text = Text.assemble((verdict.headline, f"bold {style}"), f": {verdict.text}")
    if verdict.confidence == "low":
        text.append(" (this has just changed, or changes often)", style="dim")
    for advice in verdict.advice:
        text.append(f"\n  - {advice}")
    return text


def shown(path: Path) -> str:
    """The path as short as it can be typed here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _framed(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, border_style="bright_black")
