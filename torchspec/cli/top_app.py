"""The program behind ``torchspec top``: what is drawn when, and what the keys do.

It reads the run's folder alone, so it neither slows the run nor minds when that ends, restarts or is resumed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """One of a table; ``value`` is what to sort by."""

    name: str
    value: Callable[[Any], Any]
    show: Callable[[Any], str]


def _share(read: Callable[[Any], float]) -> Callable[[Any], str]:
    return lambda row: f"{read(row):.0%}"


def _latency(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.1f} ms" if seconds < 1 else human_seconds(seconds)


WORKERS = (
    Column("worker", lambda w: w.name, lambda w: w.name),
    Column("state", lambda w: w.doing, lambda w: w.doing),
    Column("samples/s", lambda w: w.samples_per_s, lambda w: human_rate(w.samples_per_s)),
    Column("tokens/s", lambda w: w.tokens_per_s, lambda w: human_rate(w.tokens_per_s)),
    Column("waiting", lambda w: w.wait_share, _share(lambda w: w.wait_share)),
    Column("leases", lambda w: w.report.leases, lambda w: human_count(w.report.leases)),
    Column("put p99", lambda w: w.put_p99_seconds or 0.0, lambda w: _latency(w.put_p99_seconds)),
    Column("samples", lambda w: w.report.samples, lambda w: human_count(w.report.samples)),
    Column("failed", lambda w: w.report.failures, lambda w: human_count(w.report.failures)),
    Column("put", lambda w: w.put_bytes_per_s, lambda w: f"{human_bytes(w.put_bytes_per_s)}/s"),
)
RANKS = (
    Column("rank", lambda r: r.rank, lambda r: str(r.rank)),
    Column("state", lambda r: r.report.doing, lambda r: r.report.doing),
    Column("tokens/s", lambda r: r.tokens_per_s, lambda r: human_rate(r.tokens_per_s)),
    Column("step", lambda r: r.step_seconds or 0.0, lambda r: _latency(r.step_seconds)),
    Column("wait", lambda r: r.wait_share, _share(lambda r: r.wait_share)),
    Column("fwd", lambda r: r.forward_share, _share(lambda r: r.forward_share)),
    Column("bwd", lambda r: r.backward_share, _share(lambda r: r.backward_share)),
    Column("opt", lambda r: r.optimizer_share, _share(lambda r: r.optimizer_share)),
    Column("queue", lambda r: r.report.fetched_steps, lambda r: str(r.report.fetched_steps)),
    Column("get p99", lambda r: r.get_p99_seconds or 0.0, lambda r: _latency(r.get_p99_seconds)),
    Column("get", lambda r: r.get_bytes_per_s, lambda r: f"{human_bytes(r.get_bytes_per_s)}/s"),
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
        super().__init__(id=id, cursor_type="row", zebra_stripes=False, cell_padding=1)
        self._columns, self._rows_of, self._sorted_by, self._down = columns, rows, 0, False
        self._rows_shown: tuple[Any, ...] = ()

    def show(self, snapshot: Snapshot) -> None:
        self._rows_shown = self._rows_of(snapshot)
        self._draw()

    def sort_by(self, column: int) -> None:
        """The same column again turns the order round. Figures begin with the largest."""
        first_down = column > 1
        self._down = not self._down if column == self._sorted_by else first_down
        self._sorted_by = column
        self._draw()

    def sort_next(self) -> None:
        self.sort_by((self._sorted_by + 1) % len(self._columns))

    def turn_round(self) -> None:
        self.sort_by(self._sorted_by)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self.sort_by(event.column_index)

    def _draw(self) -> None:
        place, row = self.scroll_offset, self.cursor_row
        self.clear(columns=True)
        for i, column in enumerate(self._columns):
            arrow = ("↓" if self._down else "↑") if i == self._sorted_by else ""
            self.add_column(Text(column.name + arrow, justify="left" if i < 2 else "right"))
        key = self._columns[self._sorted_by].value
        for item in sorted(self._rows_shown, key=lambda r: _natural(key(r)), reverse=self._down):
            self.add_row(*(self._cell(item, i) for i in range(len(self._columns))))
        self.move_cursor(row=row, scroll=False)
        self.scroll_to(place.x, place.y, animate=False)

    def _cell(self, item: WorkerState | RankState, i: int) -> Text:
        words = self._columns[i].show(item)
        return Text(words, style=STATE_STYLES.get(words, ""), justify="left" if i < 2 else "right")


def _at_rest(worker: WorkerState) -> WorkerState:
    """What a worker that is no more did last is not what it does."""
    if worker.alive:
        return worker
    return WorkerState(worker.name, worker.doing, worker.since, worker.heard, replace(worker.report, leases=0))


def _natural(value: Any) -> Any:
    """worker-9 comes before worker-10."""
    return (len(value), value) if isinstance(value, str) else value


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
        Binding("s", "sort", "Sort"),
        Binding("S", "turn_round", "Reverse", show=False),
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
            self.query_one("#curves", Static).update(top_view.curves(look))
        elif shown != "help" and look.snapshot is not None:
            self.query_one(f"#{shown}", PoolTable).show(look.snapshot)

    def action_view(self, name: str) -> None:
        self.query_one(ContentSwitcher).current = name
        self.query_one(f"#{name}").focus()
        if self._look is not None:
            self._draw()

    def action_sort(self) -> None:
        self._with_table(PoolTable.sort_next)

    def action_turn_round(self) -> None:
        self._with_table(PoolTable.turn_round)

    def _with_table(self, change: Callable[[PoolTable], None]) -> None:
        shown = self.query_one(f"#{self.query_one(ContentSwitcher).current}")
        if isinstance(shown, PoolTable):
            change(shown)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._draw()
