"""An evaluation as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torchspec.evaluation.result import Acceptance, EvaluationResult


def render(result: EvaluationResult) -> RenderableType:
    """Acceptance overall and by category, then speed, then what was compared."""
    return Group(_acceptance_table(result), _speed_table(result), _footnote(result))


def _acceptance_table(result: EvaluationResult) -> Table:
    table = Table(title=f"Accept length, {result.settings.num_draft_tokens} draft tokens, greedy", title_justify="left")
    table.add_column("prompts")
    table.add_column("count", justify="right")
    table.add_column("accept\nlength", justify="right", style="bold")
    table.add_column("% right by position")  # one column: a block has up to 63 of them
    table.add_column("by\nSGLang", justify="right", style="dim")
    for category, acceptance in result.categories.items():
        table.add_row(category, *_cells(acceptance))
    if result.categories:
        table.add_section()
    table.add_row("all", *_cells(result.overall), style="bold")
    return table


def _cells(acceptance: Acceptance) -> list[str]:
    positions = " ".join(f"{100 * share:.1f}" for share in acceptance.position_acceptance)
    lengths = [f"{acceptance.accept_length:.3f}", f"{acceptance.server_accept_length:.3f}"]
    return [str(acceptance.prompts), lengths[0], positions, lengths[1]]


def _speed_table(result: EvaluationResult) -> Table:
    table = Table(
        title=f"Speed on {result.settings.device}, {result.settings.concurrency} at a time", title_justify="left"
    )
    table.add_column("server")
    for column in ("tokens", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for name, speed in (("with the draft", result.with_draft), ("without", result.without_draft)):
        table.add_row(name, str(speed.output_tokens), f"{speed.seconds:.1f}", f"{speed.tokens_per_s:.1f}")
    table.add_section()
    table.add_row("speed-up", "", "", f"{result.speed_up:.2f}x", style="bold")
    return table


def _footnote(result: EvaluationResult) -> Text:
    near_ties = (
        "" if result.settings.dtype == "float32" else "; in float32 all would be, here near-ties may fall either way"
    )
    return Text(
        f"{result.identical_outputs} of {result.overall.prompts} answers identical with and without the draft "
        f"({result.settings.dtype}{near_ties}). SGLang {result.sglang_version}, {result.prompt_set or 'own prompts'}, "
        f"up to {result.settings.max_tokens} tokens each.",
        style="dim",
    )
