"""The program behind ``torchspec top``: what is drawn when, and what the keys do.

It reads the run's folder alone, so it neither slows the run nor minds when that ends, restarts or is resumed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.theme import Theme
from textual.widgets import ContentSwitcher, DataTable, Footer, Static

from torchspec.cli import top_view
from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds
from torchspec.monitor.snapshot import RankState, Snapshot, WorkerState
from torchspec.monitor.watch import Look, RunWatch

THEME = Theme(
    name="torchspec",
    primary=top_view.INFERENCE,
    background="#0e131a",
    surface="#0e131a",
    panel="#202a36",
    foreground="#e6ebf1",
    dark=True,
)
HELP = """\
w  workers     r  ranks        e  events       c  curves
s  sort by the next column     S  the other way round
p  pause and go on             q  quit (also Ctrl-C)
↑ ↓ PgUp PgDn  scroll          ?  this help

[dim]waiting[/]   share of the time without a lease (workers) or without samples (ranks)
[dim]res.[/]      share of the store that is reserved by credits
[dim]accept[/]    accept length, simulated: what a chain of drafted tokens would yield
"""


@dataclass(frozen=True)
class Column:
    """One of a table: an attribute of its rows, by which they are sorted, and the words for it."""

    name: str
    attribute: str
    words: Callable[[Any], str] = str

    def value(self, row: WorkerState | RankState) -> Any:
        return attrgetter(self.attribute)(row)


def _share(value: float) -> str:
    return f"{value:.0%}"


def _speed(bytes_per_s: float) -> str:
    return f"{human_bytes(bytes_per_s)}/s"


def _latency(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.1f} ms" if seconds < 1 else human_seconds(seconds)


WORKERS = (
    Column("worker", "name"),
    Column("state", "doing"),
    Column("samples/s", "samples_per_s", human_rate),
    Column("tokens/s", "tokens_per_s", human_rate),
    Column("waiting", "wait_share", _share),
    Column("leases", "report.leases", human_count),
    Column("put p99", "put_p99_seconds", _latency),
    Column("samples", "report.samples", human_count),
    Column("failed", "report.failures", human_count),
    Column("put", "put_bytes_per_s", _speed),
)
RANKS = (
    Column("rank", "rank"),
    Column("state", "report.doing"),
    Column("tokens/s", "tokens_per_s", human_rate),
    Column("step", "step_seconds", _latency),
    Column("wait", "wait_share", _share),
    Column("fwd", "forward_share", _share),
    Column("bwd", "backward_share", _share),
    Column("opt", "optimizer_share", _share),
    Column("queue", "report.fetched_steps"),
    Column("get p99", "get_p99_seconds", _latency),
    Column("get", "get_bytes_per_s", _speed),
)
STATE_STYLES = {
    "working": top_view.INFERENCE,
    "training": top_view.TRAINING,
    "silent": top_view.LIMIT,
    "gone": top_view.BAD,
    "ended": top_view.MUTED,
}


class PoolTable(DataTable[Text]):
    """Workers or ranks, sorted by a column that a key or a click chooses."""

    def __init__(self, id: str, columns: tuple[Column, ...], rows: Callable[[Snapshot], tuple[Any, ...]]):
        super().__init__(id=id, cursor_type="row")
        self._columns, self._rows_of, self._sorted_by, self._down = columns, rows, 0, False
        self._rows_shown: tuple[Any, ...] = ()

    def show(self, snapshot: Snapshot) -> None:
        self._rows_shown = self._rows_of(snapshot)
        self._draw()

    def sort_further(self, columns: int) -> None:
        """By the column that is so many further right."""
        self.sort_by((self._sorted_by + columns) % len(self._columns))

    def sort_by(self, column: int) -> None:
        """The same column again turns the order round. Figures begin with the largest."""
        self._down = not self._down if column == self._sorted_by else column > 1
        self._sorted_by = column
        self._draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self.sort_by(event.column_index)

    def _draw(self) -> None:
        place, cursor = self.scroll_offset, self.cursor_row
        self.clear(columns=True)
        for i, column in enumerate(self._columns):
            arrow = ("↓" if self._down else "↑") if i == self._sorted_by else ""
            self.add_column(_cell(column.name + arrow, i))
        value = self._columns[self._sorted_by].value
        for row in sorted(self._rows_shown, key=lambda row: _natural(value(row)), reverse=self._down):
            self.add_row(*(_cell(column.words(column.value(row)), i) for i, column in enumerate(self._columns)))
        self.move_cursor(row=cursor, scroll=False)
        self.scroll_to(place.x, place.y, animate=False)


def _cell(words: str, column: int) -> Text:
    return Text(words, style=STATE_STYLES.get(words, ""), justify="left" if column < 2 else "right")


def _at_rest(worker: WorkerState) -> WorkerState:
    """What a worker that is no more did last is not what it does."""
    if worker.alive:
        return worker
    return WorkerState(worker.name, worker.doing, worker.since, worker.heard, replace(worker.report, leases=0))


def _natural(value: Any) -> Any:
    """worker-9 comes before worker-10, and what is not known yet is 0."""
    return (len(value), value) if isinstance(value, str) else value or 0


class TopApp(App[None]):
    """Shows the run in ``run_dir``."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: auto; padding: 0 1; }
    ContentSwitcher { height: 1fr; min-height: 4; margin-top: 1; }
    DataTable { height: 1fr; scrollbar-size: 1 1; }
    DataTable > .datatable--header { background: $background; color: #8b99aa; text-style: none; }
    DataTable > .datatable--cursor { background: $panel; }
    VerticalScroll { padding: 0 1; scrollbar-size: 1 1; }
    #curves { height: 1fr; padding: 0 1; }
    Footer { background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("w", "view('workers')", "Workers"),
        Binding("r", "view('ranks')", "Ranks"),
        Binding("e", "view('events')", "Events"),
        Binding("c", "view('curves')", "Curves"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(0)", "Reverse", show=False),
        Binding("p", "pause", "Pause"),
        Binding("question_mark", "view('help')", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(self, run_dir: Path, every_seconds: float = 1.0):
        super().__init__()
        self._watch, self._every = RunWatch(run_dir), every_seconds
        self._look: Look | None = None
        self._paused = False
        self.register_theme(THEME)
        self.theme = "torchspec"

    def compose(self) -> ComposeResult:
        yield Static(id="summary")
        with ContentSwitcher(initial="workers"):
            yield PoolTable("workers", WORKERS, lambda snapshot: tuple(map(_at_rest, snapshot.workers)))
            yield PoolTable("ranks", RANKS, lambda snapshot: snapshot.ranks)
            with VerticalScroll(id="events"):
                yield Static(id="log")
            yield Static(id="curves")
            with VerticalScroll(id="help"):
                yield Static(HELP)
        yield Footer()

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that a kill leaves the terminal as it was, too
            loop.add_signal_handler(number, self.exit)
        self.action_view("workers")
        self._refresh()
        self.set_interval(self._every, self._refresh)

    def _refresh(self) -> None:
        if not self._paused and self.query("#summary"):  # which is gone while the app closes
            self._look = self._watch.look()
            self._draw()

    def _draw(self) -> None:
        look = self._look
        assert look is not None
        self.query_one("#summary", Static).update(
            top_view.summary(look, self._watch.run_dir.resolve().name, self._paused)
        )
        shown = self.query_one(ContentSwitcher).current
        if shown == "events":
            lines = [top_view.event_line(event) for event in reversed(look.events)]
            self.query_one("#log", Static).update(Text("\n").join(lines) if lines else "no events yet")
        elif shown == "curves":
            self.query_one("#curves", Static).update(top_view.Curves(look))
        elif shown != "help" and look.snapshot is not None:
            self.query_one(f"#{shown}", PoolTable).show(look.snapshot)

    def action_view(self, name: str) -> None:
        self.query_one(ContentSwitcher).current = name
        self.query_one(f"#{name}").focus()
        if self._look is not None:
            self._draw()

    def action_sort(self, columns: int) -> None:
        shown = self.query_one(f"#{self.query_one(ContentSwitcher).current}")
        if isinstance(shown, PoolTable):
            shown.sort_further(columns)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._draw()
