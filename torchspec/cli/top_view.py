"""Pictures of ``torchspec top``: a :class:`Look` goes in, rich renderables for any width come out.

what it is called and how it is          verdict
prompts > inference > store > queue > training, the bottleneck marked
figures of both pools, the store and the draft, each with its curve
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from torchspec.cli.dashboard import sparkline
from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds
from torchspec.contracts import StepReport
from torchspec.monitor.snapshot import Snapshot
from torchspec.monitor.watch import Look, course, growth

MUTED, INFERENCE, TRAINING, STORE, DRAFT, LIMIT = "#8b99aa", "#6ea8ff", "#41cfa0", "#b794f4", "#f08ab8", "#ffab66"
BAD = "#ff8a80"
SIGNS = {"good": ("✓", TRAINING), "warning": ("!", LIMIT), "bad": ("✕", BAD), "idle": ("–", MUTED)}
CELLS = 400
"""More than a curve ever has columns."""
FAULTS = ("failed", "worker_lost", "trainer_lost", "store_lost", "controller_lost", "sample_lost", "sample_failed")


def summary(look: Look, name: str, paused: bool) -> RenderableType:
    """What stays on top, whatever is shown below."""
    lines: list[RenderableType] = [_title(look, name, paused), _verdict(look)]
    if look.snapshot is None:
        return Group(*lines)
    return Group(
        *lines, _pipeline(look, look.snapshot), _progress(look.snapshot), Text(), _figures(look, look.snapshot)
    )


def _title(look: Look, name: str, paused: bool) -> RenderableType:
    sign, style = SIGNS[look.health.level]
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    row.add_column(justify="right", no_wrap=True)
    left = Text.assemble(
        ("torchspec ", MUTED), (name, "bold"), "  ", (f"{sign} {look.health.headline}", f"bold {style}")
    )
    left.append("  " + look.health.text.replace("\n", ", "), style=MUTED)
    phase = look.snapshot.status.phase.replace("-", " ") if look.snapshot else "no data yet"
    right = Text("PAUSED", style=f"reverse {LIMIT}") if paused else Text(phase, style=TRAINING if look.live else MUTED)
    if look.snapshot is not None and not paused:
        right.append(f" {human_seconds(look.snapshot.status.uptime_seconds)}", style=MUTED)
    row.add_row(left, right)
    return row


def _verdict(look: Look) -> Text:
    style = LIMIT if look.verdict.side in ("inference", "training", "store") else TRAINING
    headline = look.verdict.headline
    text = Text(f"{headline[:1].upper()}{headline[1:]}", style=f"bold {style}")
    return text.append(f": {look.verdict.text}", style="not bold #d5dce5")


def _pipeline(look: Look, snapshot: Snapshot) -> Text:
    status, capacity = snapshot.status, snapshot.point.store_capacity_bytes or 1
    stations = {
        "prompts": f"prompts {human_count(status.samples.get('pending', 0))}",
        "inference": f"inference {human_rate(status.inference_samples_per_s)}/s",
        "store": f"store {snapshot.point.store_bytes / capacity:.0%}",
        "queue": f"queue {human_count(status.queue_depth)}",
        "training": f"training {human_rate(status.training_samples_per_s)}/s",
    }
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, words in stations.items():
        text.append(" ─▶ " if text else "", style=MUTED)
        text.append(
            f"▲ {words}" if name == look.verdict.side else words, style=f"bold {LIMIT}" * (name == look.verdict.side)
        )
    return text


def _progress(snapshot: Snapshot) -> RenderableType:
    status = snapshot.status
    row = Table.grid(expand=True, padding=(0, 1, 0, 0))
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    words = Text(f"step {status.step:,} of {status.total_steps:,}")
    if status.eta_seconds is not None and status.phase == "training":
        words.append(f", {human_seconds(status.eta_seconds)} left", style="bold")
    bar = ProgressBar(
        status.total_steps or 1, status.step, complete_style=TRAINING, finished_style=TRAINING, style="#2a3442"
    )
    row.add_row(bar, words)
    return row


def _figures(look: Look, snapshot: Snapshot) -> Table:
    """One line for each figure that matters, with its curve at the right, over the run so far."""
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(style=MUTED, no_wrap=True, width=9)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True, min_width=9)
    table.add_column(ratio=1, no_wrap=True)
    status, point, history = snapshot.status, snapshot.point, look.history
    workers = [worker.wait_share for worker in snapshot.workers if worker.alive and worker.doing != "starting"]
    ranks = [rank.wait_share for rank in snapshot.ranks]
    capacity = point.store_capacity_bytes or 1
    dim = [Text(words, style=MUTED) for words in ("samples/s", "tokens/s", "waiting")]
    table.add_row("", *dim, Text("over time", style=MUTED))
    pools = (
        (
            "inference",
            status.inference_samples_per_s,
            status.inference_tokens_per_s,
            workers,
            "captured_samples",
            INFERENCE,
        ),
        ("training", status.training_samples_per_s, status.training_tokens_per_s, ranks, "trained_samples", TRAINING),
    )
    for pool, samples, tokens, waits, counter, style in pools:
        curve = Curve(growth(history, counter, CELLS), style)
        table.add_row(pool, human_rate(samples), human_rate(tokens), _mean(waits), curve)
    depths, fills = (course(history, name, CELLS) for name in ("queue_depth", "store_bytes"))
    table.add_row("queue", human_count(point.queue_depth), "ready", "", Curve(depths, MUTED))
    shares = f"{point.store_bytes / capacity:.0%}", f"{point.credit_bytes / capacity:.0%} res."
    table.add_row("store", human_bytes(point.store_bytes), *shares, Curve(fills, STORE))
    lengths, losses = ([line[name] for line in look.train] for name in ("accept_length", "loss"))
    train, heldout = status.last_step, status.last_heldout
    table.add_row("", *(Text(words, style=MUTED) for words in ("train", "held out", "", "over steps")))
    table.add_row("accept", *_pair(train, heldout, "accept_length", 2), "tokens", Curve(lengths, DRAFT))
    rate = f"lr {train.learning_rate:.1e}" if train else ""
    table.add_row("loss", *_pair(train, heldout, "loss", 3), rate, Curve(losses, TRAINING))
    return table


def _pair(train: StepReport | None, heldout: StepReport | None, name: str, digits: int) -> tuple[Text, Text]:
    first, second = (f"{getattr(report, name):.{digits}f}" if report else "–" for report in (train, heldout))
    return Text(first), Text(second, style="bold")


def _mean(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.0%}" if shares else "–"


class Curve:
    """A line of blocks as wide as there is room."""

    def __init__(self, values: Sequence[float], style: str):
        self._values, self._style = values, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._values, options.max_width), style=self._style, no_wrap=True)


def curves(look: Look) -> RenderableType:
    """The larger pictures: what the draft learns and how fast both pools are."""
    learned = [[line[name] for line in look.train] for name in ("accept_length", "loss")]
    speeds = [growth(look.history, counter, CELLS) for counter in ("captured_samples", "trained_samples")]
    return Grid(
        Plot("accept length", "over steps", [(learned[0], DRAFT)]),
        Plot("loss", "over steps", [(learned[1], TRAINING)]),
        Plot("samples/s", "inference blue, training green", [(speeds[0], INFERENCE), (speeds[1], TRAINING)]),
        Plot("queue", "samples ready", [(course(look.history, "queue_depth", CELLS), MUTED)]),
    )


class Grid:
    """Plots in two rows of two, as high as there is room."""

    def __init__(self, *plots: Plot):
        self._plots = plots

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(5, (options.height or 20) // 2)
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        for row in (self._plots[:2], self._plots[2:]):
            grid.add_row(*(plot.sized(height - 1) for plot in row))
        yield grid


class Plot:
    """Lines of dots (two by four in a cell of Braille) over a common scale, with the scale's ends at the left."""

    def __init__(self, title: str, note: str, lines: Sequence[tuple[Sequence[float], str]], height: int = 6):
        self._title, self._note, self._lines, self._height = title, note, lines, height

    def sized(self, height: int) -> Plot:
        return Plot(self._title, self._note, self._lines, height)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self._title, "bold"), (f"  {self._note}", MUTED), no_wrap=True, overflow="ellipsis")
        values = [value for line, _ in self._lines for value in line]
        if len(values) < 2:
            yield Text("no data yet", style=MUTED)
            return
        low, high = min(values), max(values)
        rows, width = self._height - 1, options.max_width - 8
        cells: list[list[tuple[int, str]]] = [[(0, "")] * width for _ in range(rows)]
        for line, style in self._lines:
            _draw(cells, line, style, low, high)
        for i, row in enumerate(cells):
            label = high if i == 0 else low if i == rows - 1 else None
            yield Segment(f"{'' if label is None else human_rate(label):>7} ", Style.parse(MUTED))
            yield from (Segment(chr(0x2800 + dots), Style.parse(style) if style else None) for dots, style in row)
            yield Segment.line()


DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a Braille cell by column and row."""


def _draw(cells: list[list[tuple[int, str]]], line: Sequence[float], style: str, low: float, high: float) -> None:
    width, height = 2 * len(cells[0]), 4 * len(cells)
    count = min(width, len(line))
    if count < 2:
        return
    edges = [i * len(line) // count for i in range(count + 1)]
    means = [sum(line[a:b]) / (b - a) for a, b in pairwise(edges)]
    scale = (height - 1) / (high - low) if high > low else 0.0
    rows = [height - 1 - round((mean - low) * scale) for mean in means]
    before = rows[0]
    for x in range(width):
        row = rows[x * (count - 1) // (width - 1)]
        for y in range(min(row, before + (row > before)), max(row, before - (row < before)) + 1):
            dots, _ = cells[y // 4][x // 2]
            cells[y // 4][x // 2] = (dots | DOTS[x % 2][y % 4], style)
        before = row


def event_line(event: dict[str, Any]) -> Text:
    """An event of the log."""
    fault = event["kind"] in FAULTS
    style = BAD if fault else TRAINING if event["kind"] in ("checkpoint", "finished") else MUTED
    time = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S")
    kind = event["kind"].replace("_", " ")
    return Text.assemble((f"{time}  ", MUTED), (f"{'✕' if fault else '·'} {kind:<15} ", style), event["message"])
