"""A run's status as a picture of text, for any width from 50 columns and any height.

    progress            step, epoch, time left
    draft | pools       what is learned     | how fast both sides are, queue and store
    samples             the ledger as one bar
    workers             counters of each engine
    recent              the latest events

Pure: a :class:`RunStatus` and some history go in, a rich renderable comes out. The live view draws it several times a
second, ``torchspec status`` once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds
from torchspec.contracts import RunStatus, StepReport

TWO_COLUMNS = 72
"""From this inner width on, draft and pools stand side by side."""
LABEL, NUMBER = 10, 9
"""Widths of a line's label and of each of its figures."""
LEDGER_STYLES = {
    "committed": "green",
    "trained": "cyan",
    "assigned": "blue",
    "stored": "magenta",
    "leased": "yellow",
    "pending": "bright_black",
    "rejected": "red",
}
"""Ledger states from finished to untouched; the bar shows them in this order."""
PHASE_STYLES = {
    "training": "green",
    "finished": "green",
    "stopped": "yellow",
    "stopping": "yellow",
    "failed": "bold red",
}
SPARKS = "▁▂▃▄▅▆▇█"
LEAST_EVENTS = 3
LEAST_SPARKS = 6
NEARLY_FULL = 0.9


@dataclass(frozen=True)
class Dashboard:
    """Renders ``status``. ``losses`` (oldest first) becomes a small curve, ``events`` the list at the bottom."""

    status: RunStatus
    events: Sequence[str] = ()
    losses: Sequence[float] = ()
    max_lines: int | None = None
    """Workers and events are cut so that the picture has no more lines. None: as many as it takes."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inner = options.max_width - 4
        sections = [_progress(self.status)]
        if self.status.samples:
            sections += [_figures(self.status, self.losses, inner), _ledger(self.status, inner)]
        left = None
        if self.max_lines is not None:
            taken = sum(len(console.render_lines(s, options.update(width=inner))) + 1 for s in sections) + 1
            left = self.max_lines - taken
        sections += _tail(self.status, self.events, inner, left)
        body = [part for section in sections for part in (section, Text())][:-1]
        yield Panel(
            Group(*body),
            title=Text.assemble(("torchspec ", "bold"), (self.status.run, "cyan")),
            title_align="left",
            subtitle=_phase(self.status),
            subtitle_align="right",
            border_style="bright_black",
            box=box.ROUNDED,
        )


def phase_text(status: RunStatus) -> str:
    """What the run is doing."""
    return status.phase.replace("-", " ")


def _phase(status: RunStatus) -> Text:
    text = Text(phase_text(status), style=PHASE_STYLES.get(status.phase, "cyan"))
    return text.append(f" · {human_seconds(status.uptime_seconds)}", style="dim")


def _progress(status: RunStatus) -> RenderableType:
    if not status.total_steps:
        return _row(_bar(0, 1, "cyan"), Text("no step yet", style="dim"))
    figures = Text(f"step {status.step:,}/{status.total_steps:,}")
    figures.append(f" · epoch {status.epoch + 1}/{status.epochs}", style="dim")
    if status.eta_seconds is not None and status.phase == "training":
        figures.append(f" · {human_seconds(status.eta_seconds)} left", style="cyan")
    return _row(_bar(status.step, status.total_steps, "cyan"), figures)


def _figures(status: RunStatus, losses: Sequence[float], width: int) -> RenderableType:
    draft, pools = _draft(status, losses), _pools(status)
    if width < TWO_COLUMNS:
        return Group(draft, Text(), pools)
    grid = Table.grid(Column(ratio=1), Column(ratio=1), expand=True, padding=(0, 2, 0, 0))
    grid.add_row(draft, pools)
    return grid


def _draft(status: RunStatus, losses: Sequence[float]) -> RenderableType:
    """Loss, accept length and accuracy per position, on the training batch and on held-out samples."""
    reports = [report for report in (status.last_step, status.last_heldout) if report is not None]
    grid = _grid("Draft", ["train" if r.split == "train" else "held-out" for r in reports])
    if not reports:
        grid.add_row("", Text("no step yet", style="dim"))
        return grid
    curve = Padding(Sparkline(losses, "cyan"), (0, 1, 0, 0))
    grid.add_row("loss", _columns(curve, [f"{r.loss:.3f}" for r in reports]))
    grid.add_row("accept len", _columns("", [f"[bold]{r.accept_length:.2f}" for r in reports]))
    for t in range(len(reports[0].full_accuracy)):
        bar = _row(Text(f"{t + 1}", style="dim"), _bar(reports[-1].full_accuracy[t], 1.0, "green"), wide=1)
        grid.add_row("" if t else "accuracy", _columns(bar, [f"{r.full_accuracy[t]:.2f}" for r in reports]))
    if status.last_step is not None:
        gradient = ("  gradient ", "dim"), f"{status.last_step.grad_norm:.3g}"
        grid.add_row("lr", Text.assemble(f"{status.last_step.learning_rate:.2e}", *gradient))
    return grid


def _pools(status: RunStatus) -> RenderableType:
    """How fast both pools are, what lies between them, and where a step's time goes."""
    grid = _grid("Pools", ["samples/s", "tokens/s"])
    speeds = {
        "inference": (status.inference_samples_per_s, status.inference_tokens_per_s),
        "training": (status.training_samples_per_s, status.training_tokens_per_s),
    }
    for pool, (samples, tokens) in speeds.items():
        grid.add_row(pool, _columns("", [human_rate(samples), human_rate(tokens)]))
    grid.add_row("queue", Text.assemble(human_count(status.queue_depth), (" samples ready", "dim")))
    for name, used in (("store", status.store_bytes), ("credits", status.credit_bytes)):
        figures = Text.assemble(human_bytes(used), (f" / {human_bytes(status.store_capacity)}", "dim"))
        style = "yellow" if used > NEARLY_FULL * status.store_capacity else "magenta"
        grid.add_row(name, _row(_bar(used, status.store_capacity, style), figures))
    if status.last_step is not None:
        _add_step_time(grid, status.last_step)
    return grid


def _add_step_time(grid: Table, step: StepReport) -> None:
    parts = {"wait": step.wait_seconds, "compute": step.compute_seconds, "optimizer": step.optimizer_seconds}
    total = sum(parts.values())
    grid.add_row("step", Text(f"{total:.3g} s"))
    for name, seconds in parts.items():
        share = seconds / total if total else 0.0
        bar = _row(Text(f"{name:<9}", style="dim"), _bar(share, 1.0, "red" if name == "wait" else "blue"), wide=1)
        grid.add_row("", _columns(bar, [f"{share:.0%}"]))
    grid.add_row("fetch", Text.assemble(f"{step.fetch_seconds:.3g} s", (" in the background", "dim")))


def _ledger(status: RunStatus, width: int) -> RenderableType:
    """Every sample of the run in one bar, from committed to untouched."""
    counts = {state: status.samples.get(state, 0) for state in LEDGER_STYLES}
    total = sum(counts.values())
    if not total:
        return Text("no samples yet", style="dim")
    bar = Text(no_wrap=True)
    seen = drawn = 0
    for state, count in counts.items():
        seen += count
        cells = round(seen * width / total) - drawn
        bar.append("━" * cells, style=LEDGER_STYLES[state])
        drawn += cells
    legend = [
        Text.assemble(("■ ", LEDGER_STYLES[state]), (f"{state} ", "dim"), human_count(count), no_wrap=True)
        for state, count in counts.items()
        if count
    ]
    return Group(bar, Columns(legend, padding=(0, 2)))


def _tail(status: RunStatus, events: Sequence[str], width: int, lines: int | None) -> list[RenderableType]:
    """Workers and events in the lines that are left; workers get what few events do not need."""
    sections: list[RenderableType] = []
    count = len(status.workers)
    if count:
        reserved = min(len(events), LEAST_EVENTS) + 1 if events else 0
        room = count if lines is None else min(count, lines - reserved - 2)
        if room > 0:
            sections.append(_workers(status, room, width))
            lines = None if lines is None else lines - room - 2
    if events and (lines is None or lines > 1):
        sections.append(_events(events if lines is None else events[1 - lines :]))
    return sections


def _workers(status: RunStatus, room: int, width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim", pad_edge=False)
    there, wanted = len(status.workers), status.workers_wanted
    title = "worker" if wanted in (0, there) else f"worker ({there} of {wanted})"
    table.add_column(title, ratio=1, no_wrap=True, min_width=10)
    full = width >= TWO_COLUMNS
    for name in ("samples", "tokens", "answered", "stored", "put", "busy") if full else ("samples", "tokens", "busy"):
        table.add_column(name, justify="right", no_wrap=True)
    workers = status.workers
    shown = workers if len(workers) <= room else workers[: room - 1]
    for w in shown:
        answered, stored = human_count(w.answer_tokens), human_bytes(w.put_bytes)
        speed = f"{human_bytes(w.put_bytes / w.put_seconds)}/s" if w.put_seconds else "-"
        busy = f"{w.busy_seconds / max(w.seconds, 1):.0%}"
        more = (answered, stored, speed) if full else ()
        table.add_row(Text(w.worker), human_count(w.samples), human_count(w.tokens), *more, busy)
    if len(shown) < len(workers):
        table.add_row(Text(f"and {len(workers) - len(shown)} more", style="dim"))
    return table


def _events(events: Iterable[str]) -> RenderableType:
    return Group(*(Text(f"· {event}", style="dim", no_wrap=True, overflow="ellipsis") for event in events))


@dataclass(frozen=True)
class Sparkline:
    """Values as one line of blocks, scaled to their own range, as wide as there is room."""

    values: Sequence[float]
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self.values, options.max_width), style=self.style, no_wrap=True)


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` blocks; empty where fewer than :data:`LEAST_SPARKS` would tell nothing."""
    cells = min(width, len(values))
    if cells < LEAST_SPARKS:
        return ""
    means = resampled(values, cells)
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def resampled(values: Sequence[float], count: int) -> list[float]:
    """Means of ``count`` stretches of equal length; ``count`` is at most the number of values."""
    edges = [i * len(values) // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _grid(title: str, headings: Sequence[str]) -> Table:
    columns = Column(width=LABEL, style="dim", no_wrap=True), Column(ratio=1, no_wrap=True)
    grid = Table.grid(*columns, expand=True, padding=(0, 1, 0, 0))
    grid.add_row(Text(title, style="bold not dim"), _columns("", [f"[dim]{heading}" for heading in headings]))
    return grid


def _columns(first: RenderableType, numbers: Sequence[str]) -> Table:
    """``first`` takes what is left of the line, the numbers stand right in columns of equal width."""
    columns = (Column(width=NUMBER, justify="right", no_wrap=True) for _ in numbers)
    row = Table.grid(Column(ratio=1, no_wrap=True), *columns, expand=True)
    row.add_row(first, *numbers)
    return row


def _row(left: RenderableType, right: RenderableType, wide: int = 0) -> Table:
    """Two things in a line; number ``wide`` takes the room that the other leaves."""
    columns = (Column(ratio=1 if i == wide else None, no_wrap=True) for i in range(2))
    row = Table.grid(*columns, expand=True, padding=(0, 1, 0, 0))
    row.add_row(left, right)
    return row


def _bar(value: float, total: float, style: str) -> ProgressBar:
    return ProgressBar(total=total or 1.0, completed=value, complete_style=style, finished_style=style)
