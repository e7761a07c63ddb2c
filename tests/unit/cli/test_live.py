"""What is printed while a run goes on: a picture on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from tests.clock import Clock
from tests.unit.cli.statuses import COUNTING, STARTING, TRAIN, TRAINING
from torchspec.cli.live import HEARTBEAT_SECONDS, LiveView, PlainView, open_view
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(clock: Clock, output: io.StringIO) -> Iterator[PlainView]:
    view = PlainView(10, Console(file=output), clock)
    yield view
    view.close()


def at_step(step: int) -> RunStatus:
    return replace(TRAINING, step=step, last_step=replace(TRAIN, step=step), last_heldout=None)


def test_plain_prints_a_line_for_every_so_many_steps(plain: PlainView, output: io.StringIO) -> None:
    for step in range(1, 36):
        plain.status(at_step(step))
        plain.status(at_step(step))
    lines = [line.partition("] ")[2] for line in output.getvalue().splitlines()]
    assert [line.split(" · ")[0] for line in lines] == ["training", "step 10/1,000", "step 20/1,000", "step 30/1,000"]


def test_plain_lines_hold_the_figures(plain: PlainView, output: io.StringIO, clock: Clock) -> None:
    plain.status(STARTING)
    clock.now = 75
    plain.message("worker-1 died (killed); starting another")
    plain.status(TRAINING)
    assert output.getvalue().splitlines() == [
        "[    0s] counting vocabulary",
        "[ 1m15s] worker-1 died (killed); starting another",
        "[ 1m15s] training",
        "[ 1m15s] step 620/1,000 · loss 3.412 · accept length 2.01 · accuracy 0.62 0.45 0.32 0.23 0.17 · lr 1.83e-03"
        " · 3.97 samples/s · 7m12s left",
        "[ 1m15s] held-out at step 600: loss 3.777 · accept length 1.91 · accuracy 0.58 0.42 0.30 0.22 0.15",
    ]


def test_control_codes_in_a_reason_do_nothing(plain: PlainView, output: io.StringIO) -> None:
    forged = "rejected x: \n[ 9m00s] step 100/100 · all is well\x1b[2J\r"
    plain.message(forged)
    escaped = "rejected x: \\n[ 9m00s] step 100/100 · all is well\\x1b[2J\\r"
    assert output.getvalue() == f"[    0s] {escaped}\n"
    live = LiveView(Console(width=100, height=50, force_terminal=True, file=io.StringIO()))
    live.message(forged)
    live.close()
    assert list(live._events) == [escaped]


def test_plain_has_a_heartbeat_only_when_nothing_else_was_said(
    plain: PlainView, output: io.StringIO, clock: Clock
) -> None:
    plain.status(COUNTING)
    for clock.now in (5.0, 10.0, HEARTBEAT_SECONDS - 0.1):
        plain.status(COUNTING)
        plain.heartbeat()
    assert len(output.getvalue().splitlines()) == 1
    clock.now = HEARTBEAT_SECONDS
    plain.heartbeat()
    clock.now += 1
    plain.heartbeat()
    _, heartbeat = output.getvalue().splitlines()
    assert "counting vocabulary" in heartbeat
    assert "4,821 samples captured (2.5M tokens) · 913,578 answer tokens written" in heartbeat
    plain.message("an event")
    clock.now += HEARTBEAT_SECONDS - 0.1
    plain.heartbeat()
    assert output.getvalue().splitlines()[-1].endswith("an event")


def test_plain_has_a_heartbeat_before_there_is_a_status(output: io.StringIO, clock: Clock) -> None:
    plain = PlainView(10, Console(file=output), clock)
    plain.message("starting Ray")
    clock.now = HEARTBEAT_SECONDS
    deadline = time.monotonic() + 30
    while len(output.getvalue().splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert output.getvalue() == "[    0s] starting Ray\n[   15s] still starting Ray\n"
    plain.close()
    clock.now *= 10
    time.sleep(1.5)
    assert output.getvalue().count("\n") == 2


def test_the_live_view_draws_the_latest_status_and_events() -> None:
    output = io.StringIO()
    console = Console(width=100, height=50, force_terminal=True, file=output)
    view = LiveView(console)
    view.message("reading the prompts")
    for step in range(1, 30):
        view.status(replace(TRAINING, step=step, last_step=replace(TRAIN, step=step, loss=30.0 - step)))
    view.close()
    view.close()
    with console.capture() as capture:
        console.print(view._picture())
    assert "reading the prompts" in capture.get() and "█" in capture.get() and "▁" in capture.get()
    assert "29" in output.getvalue() and output.getvalue().endswith("\x1b[?25h"), "the cursor is back"


def test_which_view_is_opened() -> None:
    terminal = Console(force_terminal=True, force_interactive=True, file=io.StringIO())
    pipe = Console(file=io.StringIO())
    for live, console, kind in (
        ("auto", terminal, LiveView),
        ("auto", pipe, PlainView),
        ("on", pipe, LiveView),
        ("off", terminal, PlainView),
    ):
        view = open_view(MonitorConfig.model_validate({"live": live}), console)
        view.close()
        assert type(view) is kind
