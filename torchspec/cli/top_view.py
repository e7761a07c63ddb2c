"""Pictures of ``torchspec top``: a :class:`Look` goes in, rich renderables for any width come out.

what it is called and how it is          verdict
prompts > inference > store > queue > training, the bottleneck marked
figures of both pools, the store and the draft, each with its curve
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from torchspec.cli.dashboard import Sparkline, phase_text, resampled
from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds
from torchspec.contracts import StepReport
from torchspec.monitor.health import FAULTS
from torchspec.monitor.snapshot import Snapshot
from torchspec.monitor.watch import Look, course, growth

MUTED, INFERENCE, TRAINING, STORE, DRAFT, LIMIT = "#8b99aa", "#6ea8ff", "#41cfa0", "#b794f4", "#f08ab8", "#ffab66"
BAD = "#ff8a80"
SIGNS = {"good": ("✓", TRAINING), "warning": ("!", LIMIT), "bad": ("✕", BAD), "idle": ("–", MUTED)}
CELLS = 400
"""More than a curve ever has columns."""
BAD_EVENTS = {*FAULTS, "failed", "sample_lost", "sample_failed"}


def summary(look: Look, name: str, paused: bool) -> RenderableType:
    """What stays on top, whatever is shown below."""
    lines: list[RenderableType] = [_title(look, name, paused), _verdict(look)]
    if look.snapshot is not None:
        lines += [_pipeline(look, look.snapshot), _progress(look.snapshot), Text(), _figures(look, look.snapshot)]
    return Group(*lines)


def _title(look: Look, name: str, paused: bool) -> RenderableType:
    sign, style = SIGNS[look.health.level]
    left = Text.assemble(
        ("torchspec ", MUTED), (name, "bold"), "  ", (f"{sign} {look.health.headline}", f"bold {style}")
    )
    left.append("  " + look.health.text.replace("\n", ", "), style=MUTED)
    status = look.snapshot.status if look.snapshot is not None else None
    if paused:
        right = Text("PAUSED", style=f"reverse {LIMIT}")
    else:
        right = Text(phase_text(status) if status else "no data yet", style=TRAINING if look.live else MUTED)
        right.append(f" {human_seconds(status.uptime_seconds)}" if status else "", style=MUTED)
    columns = Column(no_wrap=True, ratio=1), Column(justify="right", no_wrap=True)
    row = Table.grid(*columns, expand=True, padding=(0, 1))
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
        limits = name == look.verdict.side
        text.append(f"▲ {words}" if limits else words, style=f"bold {LIMIT}" if limits else "")
    return text


def _progress(snapshot: Snapshot) -> RenderableType:
    status = snapshot.status
    row = Table.grid(Column(ratio=1), Column(no_wrap=True), expand=True, padding=(0, 1, 0, 0))
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
    figures = (Column(justify="right", no_wrap=True, min_width=9) for _ in range(3))
    columns = Column(style=MUTED, no_wrap=True, width=9), *figures, Column(ratio=1, no_wrap=True)
    table = Table.grid(*columns, expand=True, padding=(0, 2, 0, 0))
    status, point, history = snapshot.status, snapshot.point, look.history
    table.add_row(*_headings("", "samples/s", "tokens/s", "waiting", "over time"))
    workers = [worker.wait_share for worker in snapshot.workers if worker.alive and worker.doing != "starting"]
    speeds = human_rate(status.inference_samples_per_s), human_rate(status.inference_tokens_per_s)
    curve = Sparkline(growth(history, "captured_samples", CELLS), INFERENCE)
    table.add_row("inference", *speeds, _mean(workers), curve)
    ranks = [rank.wait_share for rank in snapshot.ranks]
    speeds = human_rate(status.training_samples_per_s), human_rate(status.training_tokens_per_s)
    curve = Sparkline(growth(history, "trained_samples", CELLS), TRAINING)
    table.add_row("training", *speeds, _mean(ranks), curve)
    curve = Sparkline(course(history, "queue_depth", CELLS), MUTED)
    table.add_row("queue", human_count(point.queue_depth), "ready", "", curve)
    capacity = point.store_capacity_bytes or 1
    shares = f"{point.store_bytes / capacity:.0%}", f"{point.credit_bytes / capacity:.0%} res."
    curve = Sparkline(course(history, "store_bytes", CELLS), STORE)
    table.add_row("store", human_bytes(point.store_bytes), *shares, curve)
    train, heldout = status.last_step, status.last_heldout
    table.add_row(*_headings("", "train", "held out", "", "over steps"))
    curve = Sparkline(_learned(look, "accept_length"), DRAFT)
    table.add_row("accept", *_pair(train, heldout, "accept_length", 2), "tokens", curve)
    rate = f"lr {train.learning_rate:.1e}" if train else ""
    table.add_row("loss", *_pair(train, heldout, "loss", 3), rate, Sparkline(_learned(look, "loss"), TRAINING))
    return table


def _headings(*names: str) -> list[Text]:
    return [Text(name, style=MUTED) for name in names]


def _pair(train: StepReport | None, heldout: StepReport | None, name: str, digits: int) -> tuple[Text, Text]:
    first, second = (f"{getattr(report, name):.{digits}f}" if report else "–" for report in (train, heldout))
    return Text(first), Text(second, style="bold")


def _mean(shares: Sequence[float]) -> str:
    return f"{fmean(shares):.0%}" if shares else "–"


def _learned(look: Look, name: str) -> list[float]:
    return [line[name] for line in look.train]


@dataclass(frozen=True)
class Curves:
    """The larger pictures, two by two and as high as there is room: what the draft learns, how fast both pools are."""

    look: Look

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(5, (options.height or 20) // 2) - 1
        history = self.look.history
        captured, trained = (growth(history, counter, CELLS) for counter in ("captured_samples", "trained_samples"))
        queue = course(history, "queue_depth", CELLS)
        grid = Table.grid(Column(ratio=1), Column(ratio=1), expand=True, padding=(0, 2, 0, 0))
        grid.add_row(
            Plot("accept length", "over steps", [(_learned(self.look, "accept_length"), DRAFT)], height),
            Plot("loss", "over steps", [(_learned(self.look, "loss"), TRAINING)], height),
        )
        speeds = [(captured, INFERENCE), (trained, TRAINING)]
        grid.add_row(
            Plot("samples/s", "inference blue, training green", speeds, height),
            Plot("queue", "samples ready", [(queue, MUTED)], height),
        )
        yield grid


Cells = list[list[tuple[int, str]]]
"""Rows of Braille cells: which dots are set, and the style of the last one."""
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a Braille cell by column and row."""


@dataclass(frozen=True)
class Plot:
    """Lines of dots (two by four in a cell of Braille) over a common scale, with the scale's ends at the left."""

    title: str
    note: str
    lines: Sequence[tuple[Sequence[float], str]]
    height: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.title, "bold"), (f"  {self.note}", MUTED), no_wrap=True, overflow="ellipsis")
        values = [value for line, _ in self.lines for value in line]
        if len(values) < 2:
            yield Text("no data yet", style=MUTED)
            return
        low, high = min(values), max(values)
        rows, width = self.height - 1, options.max_width - 8
        cells: Cells = [[(0, "")] * width for _ in range(rows)]
        for line, style in self.lines:
            _draw(cells, line, style, low, high)
        for i, row in enumerate(cells):
            label = high if i == 0 else low if i == rows - 1 else None
            yield Segment(f"{'' if label is None else human_rate(label):>7} ", Style.parse(MUTED))
            yield from (Segment(chr(0x2800 + dots), Style.parse(style) if style else None) for dots, style in row)
            yield Segment.line()


def _draw(cells: Cells, line: Sequence[float], style: str, low: float, high: float) -> None:
    width, height = 2 * len(cells[0]), 4 * len(cells)
    if len(line) < 2:
        return
    means = resampled(line, min(width, len(line)))
    scale = (height - 1) / (high - low) if high > low else 0.0
    rows = [height - 1 - round((mean - low) * scale) for mean in means]
    before = rows[0]
    for x in range(width):
        row = rows[x * (len(rows) - 1) // (width - 1)]
        for y in range(min(row, before + (row > before)), max(row, before - (row < before)) + 1):
            dots, _ = cells[y // 4][x // 2]
            cells[y // 4][x // 2] = (dots | DOTS[x % 2][y % 4], style)
        before = row


def event_line(event: dict[str, Any]) -> Text:
    """An event of the log."""
    bad = event["kind"] in BAD_EVENTS
    style = BAD if bad else TRAINING if event["kind"] in ("checkpoint", "finished") else MUTED
    time = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S")
    kind = event["kind"].replace("_", " ")
    return Text.assemble((f"{time}  ", MUTED), (f"{'✕' if bad else '·'} {kind:<15} ", style), event["message"])
