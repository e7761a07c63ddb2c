"""Tables that commands print at their end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from torchspec.cli.units import human_bytes, human_count, human_seconds
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.config.schema import TrainingConfig
    from torchspec.controller.verify import Proof
    from torchspec.data.survey import Survey
    from torchspec.driver.plan import Plan
    from torchspec.driver.run import RunSummary
    from torchspec.evaluation.result import Acceptance, EvaluationResult
    from torchspec.monitor import bottleneck
    from torchspec.monitor.health import Health


def pairs_table(title: str, pairs: Mapping[str, str]) -> Table:
    """Names on the left, values on the right."""
    table = _framed(title, Column(style="dim", no_wrap=True), Column(overflow="fold"))
    table.show_header = False
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table


def plan_table(plan: Plan, data: Survey, training: TrainingConfig) -> RenderableType:
    """What a run needs and does: the target as it was found, its actors, then its figures."""
    actors = _framed("Actors", "role", _figure("count"), "each uses")
    for role, count, uses in plan.actors:
        actors.add_row(role, str(count), uses)
    expected, available = human_bytes(plan.memory_bytes), human_bytes(plan.memory_available)
    figures = pairs_table(
        "Figures",
        {
            "data": _data_text(data),
            "steps": f"{training.total_steps(data.rows):,} of {training.batch_size} samples",
            "threads": f"{plan.threads.inference} an engine, {plan.threads.training} a rank, of {plan.cores} cores",
            "largest sample": f"{plan.tokens_per_sample:,} tokens, {human_bytes(plan.sample_bytes)} in the store",
            "store": f"{human_bytes(plan.credit_bytes)} of credits: {plan.store_samples:,} samples of the largest size",
            "draft": f"{human_count(plan.draft_parameters)} trained parameters; {plan.draft}",
            "memory": f"about {expected} of {available}",
            **({"sizes found": _sizes_text(plan.found)} if plan.found else {}),
        },
    )
    parts: list[RenderableType] = [pairs_table("Target", plan.target), actors, figures, _splits_table(plan)]
    if plan.memory_bytes > plan.memory_available or any(s.obstacle for s in plan.splits if s.configured):
        parts.append(
            Text(
                f"This is more than the machine has: use one with more than {expected} of memory, choose a split that "
                "fits, or lower inference.workers or data.max_seq_length.",
                style="yellow",
            )
        )
    return Group(*parts)


def _sizes_text(found: Mapping[str, int]) -> str:
    """As they can be written into a recipe, but for digits that do not matter."""
    shown = (human_bytes(size) if knob.endswith("_bytes") else str(size) for knob, size in found.items())
    return "\n".join(f"{knob}: {size}" for knob, size in zip(found, shown, strict=True))


def _splits_table(plan: Plan) -> Table:
    figures = map(_figure, ("ranks", "memory of each", "longest sample"))
    title = f"Ranks that share a sample of {plan.tokens_per_sample:,} tokens"
    table = _framed(title, "ulysses x ring", *figures, "fits")
    for split in plan.splits:
        table.add_row(
            f"{split.ulysses} x {split.ring}{' (configured)' if split.configured else ''}",
            str(split.ranks),
            human_bytes(split.rank_bytes),
            f"{split.longest:,} tokens",
            f"no: {split.obstacle}" if split.obstacle else "yes",
            style="bold" if split.configured else "",
        )
    return table


def _data_text(data: Survey) -> str:
    from torchspec.data.prompt_set import count_reasons

    about = "" if data.exact else "about "
    text = f"{about}{data.rows:,} conversations of {data.tokens:,} tokens"
    if data.answer_tokens:
        text += f", and up to {data.answer_tokens:,} that the target answers"
    sampled = "" if data.exact else " of a sample"
    for reason, count in count_reasons(data.rejected).items():
        first = next(name for name, text in data.rejected if text.partition(": ")[0] == reason)
        text += f"\n{count:,} rejected{sampled}: {reason} ({first}{', ...' if count > 1 else ''})"
    for what, count in data.changes.items():
        text += f"\n{count:,} changed{sampled}: {what}"
    return text


def summary_table(summary: RunSummary) -> RenderableType:
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
    run = quote(shown(summary.run_dir))
    command = f"resume {run}" if summary.stopped else f"eval {run}" if summary.export is not None else f"export {run}"
    failure = [Text(f"no export: {summary.export_failure}", style="red")] if summary.export_failure else []
    return Group(table, *failure, Text.assemble(("next: ", "dim"), (f"torchspec {command}", "cyan")))


def proof_table(title: str, proof: Proof) -> Table:
    """Where the samples of each epoch are."""
    columns = map(_figure, ("epoch", "data set", "trained", "of these committed", "rejected", "not yet trained"))
    table = _framed(f"{title}: step {proof.steps:,}, the last checkpoint has {proof.committed_step:,}", *columns)
    for count in proof.epochs:
        figures = count.prompts, count.trained, count.committed, count.rejected, count.left
        table.add_row(str(count.epoch), *(f"{figure:,}" for figure in figures))
    return table


def evaluation_tables(result: EvaluationResult) -> RenderableType:
    """Acceptance overall and by category, then speed, then what was compared."""
    return Group(_acceptance(result), _speed(result), _served(result))


def _acceptance(result: EvaluationResult) -> Table:
    table = Table(
        "prompts",
        _figure("count"),
        _figure("accept\nlength", "bold"),
        "% right by position",  # one column: a block has up to 63 of them
        _figure("by\nSGLang", "dim"),
        title=f"Accept length, {result.settings.num_draft_tokens} draft tokens, greedy",
        title_justify="left",
    )
    for category, acceptance in result.categories.items():
        table.add_row(category, *_cells(acceptance))
    if result.categories:
        table.add_section()
    table.add_row("all", *_cells(result.overall), style="bold")
    return table


def _cells(acceptance: Acceptance) -> list[str]:
    positions = " ".join(f"{100 * share:.1f}" for share in acceptance.position_acceptance)
    length, by_server = (f"{x:.3f}" for x in (acceptance.accept_length, acceptance.server_accept_length))
    return [str(acceptance.prompts), length, positions, by_server]


def _speed(result: EvaluationResult) -> Table:
    title = f"Speed on {result.settings.device}, {result.settings.concurrency} at a time"
    table = Table("server", *map(_figure, ("tokens", "seconds", "tokens/s")), title=title, title_justify="left")
    for name, speed in (("with the draft", result.with_draft), ("without", result.without_draft)):
        table.add_row(name, str(speed.output_tokens), f"{speed.seconds:.1f}", f"{speed.tokens_per_s:.1f}")
    table.add_section()
    table.add_row("speed-up", "", "", f"{result.speed_up:.2f}x", style="bold")
    return table


def _served(result: EvaluationResult) -> Text:
    dtype = result.settings.dtype
    near_ties = "" if dtype == "float32" else "; in float32 all would be, here near-ties may fall either way"
    return Text(
        f"{result.identical_outputs} of {result.overall.prompts} answers identical with and without the draft "
        f"({dtype}{near_ties}). SGLang {result.sglang_version}, {result.prompt_set}, "
        f"up to {result.settings.max_tokens} tokens each.",
        style="dim",
    )


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


def _framed(title: str, *columns: Column | str) -> Table:
    return Table(
        *columns, title=title, title_justify="left", title_style="bold", box=box.ROUNDED, border_style="bright_black"
    )


def _figure(name: str, style: str = "") -> Column:
    return Column(name, justify="right", style=style)
