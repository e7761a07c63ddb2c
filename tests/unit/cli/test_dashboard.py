"""What a person sees of a run: the dashboard at every size, the live view, plain lines, figures."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from tests.clock import Clock
from torchspec.cli.dashboard import Dashboard, sparkline
from torchspec.cli.live import HEARTBEAT_SECONDS, LiveView, PlainView, open_view
from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport, WorkerReport

ACCURACY = (0.62, 0.45, 0.32, 0.23, 0.17)
TRAIN = StepReport(
    step=620,
    loss=3.412,
    loss_per_position=(3.4, 3.7, 4.0, 4.3, 4.6),
    accuracy=ACCURACY,
    full_accuracy=ACCURACY,
    accept_length=2.01,
    learning_rate=1.83e-3,
    grad_norm=0.4123,
    tokens=2311,
    loss_tokens=1200,
    wait_seconds=0.25,
    fetch_seconds=0.05,
    compute_seconds=2.1,
    optimizer_seconds=0.1,
)
HELDOUT = replace(
    TRAIN, step=600, loss=3.777, full_accuracy=(0.58, 0.42, 0.30, 0.22, 0.15), accept_length=1.91, split="heldout"
)
TRAINING = RunStatus(
    run="smollm2",
    phase="training",
    step=620,
    total_steps=1000,
    epoch=1,
    epochs=3,
    samples={
        "pending": 2480,
        "leased": 32,
        "stored": 41,
        "assigned": 16,
        "trained": 160,
        "committed": 4800,
        "rejected": 3,
    },
    store_bytes=412 << 20,
    store_capacity=920 << 20,
    credit_bytes=610 << 20,
    queue_depth=38,
    workers=tuple(
        WorkerReport(f"worker-{i}", 2410 + i, 1_234_567, 456_789, 12 << 30, 9.1, 812.0, seconds=1324.0)
        for i in range(2)
    ),
    last_step=TRAIN,
    last_heldout=HELDOUT,
    inference_tokens_per_s=3912.0,
    inference_samples_per_s=8.12,
    training_tokens_per_s=1204.0,
    training_samples_per_s=3.97,
    eta_seconds=432.0,
    uptime_seconds=1324.0,
)
COUNTING = replace(
    TRAINING,
    phase="counting-vocabulary",
    step=0,
    samples={"pending": 400, "leased": 32, "stored": 37},
    last_step=None,
    last_heldout=None,
    eta_seconds=None,
)
STARTING = replace(COUNTING, phase="counting-vocabulary", total_steps=0, samples={}, workers=(), store_bytes=0)


def lines_of(dashboard: Dashboard, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(dashboard)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_dashboard_shows_every_figure_at_any_width(width: int) -> None:
    lines = lines_of(Dashboard(TRAINING, ("checkpoint saved",), [5.0, 4.0, 3.0] * 9), width)
    assert {len(line) for line in lines} == {width}
    text = " ".join(lines)
    for figure in ("smollm2", "step 620/1,000", "epoch 2/3", "7m12s left", "training · 22m04s"):
        assert figure in text
    for figure in ("3.412", "3.777", "2.01", "1.91", "1.83e-03", "0.412", *(f"{a:.2f}" for a in ACCURACY)):
        assert figure in text, "the draft's"
    for figure in ("8.12", "3,912", "3.97", "1,204", "38", "412 MiB", "610 MiB", "920 MiB", "2.45 s", "86%", "0.05 s"):
        assert figure in text, "the pools'"
    for figure in ("committed 4,800", "trained 160", "stored 41", "leased 32", "pending 2,480", "rejected 3"):
        assert figure in text, "the ledger's"
    for figure in ("worker-0", "worker-1", "2,411", "61%", "checkpoint saved"):
        assert figure in text
    assert "…" not in text


def test_bars_are_as_long_as_their_values() -> None:
    def filled(status: RunStatus) -> int:
        return lines_of(Dashboard(status), 100)[1].count("━")

    assert filled(replace(TRAINING, step=0)) == 0
    quarter, half, full = (filled(replace(TRAINING, step=s)) for s in (250, 500, 1000))
    assert quarter > 5 and abs(half - 2 * quarter) <= 2 and abs(full - 2 * half) <= 2


def test_the_ledger_bar_fills_the_line_and_follows_the_counts() -> None:
    console = Console(width=104, record=True, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(Dashboard(replace(TRAINING, samples={"committed": 75, "pending": 25})))
    bar = next(line for line in console.export_text(styles=True).splitlines() if "━" * 75 in line)
    assert f"\x1b[32m{'━' * 75}\x1b[0m" in bar and f"\x1b[90m{'━' * 25}\x1b[0m" in bar


def test_a_pool_that_changes_says_so() -> None:
    changing = "\n".join(lines_of(Dashboard(replace(TRAINING, workers_wanted=5)), 100))
    settled = "\n".join(lines_of(Dashboard(replace(TRAINING, workers_wanted=2)), 100))
    assert "worker (2 of 5)" in changing and " of 2)" not in settled


@pytest.mark.parametrize(
    "status", [STARTING, COUNTING, replace(TRAINING, last_heldout=None), replace(TRAINING, last_step=None)]
)
@pytest.mark.parametrize("width", [50, 80, 160])
def test_it_can_be_drawn_at_every_stage(status: RunStatus, width: int) -> None:
    lines = lines_of(Dashboard(status), width)
    assert {len(line) for line in lines} == {width}
    assert status.phase.replace("-", " ") in lines[-1]


def test_the_starting_dashboard_says_what_it_waits_for() -> None:
    assert "counting vocabulary" in lines_of(Dashboard(STARTING), 80)[-1]


@pytest.mark.parametrize("max_lines", [22, 26, 30, 50])
def test_workers_and_events_are_cut_to_the_terminals_height(max_lines: int) -> None:
    workers = tuple(replace(TRAINING.workers[0], worker=f"worker-{i}") for i in range(20))
    events = [f"event {i}" for i in range(20)]
    lines = lines_of(Dashboard(replace(TRAINING, workers=workers), events, max_lines=max_lines), 100)
    assert len(lines) <= max_lines
    assert "event 19" in lines[-2], "the latest event stays"
    shown = sum("│ worker-" in line for line in lines)
    hidden = [line for line in lines if line.startswith("│ and ")]
    assert shown in (0, 20) or f"and {20 - shown} more" in hidden[0]
    assert shown == {22: 0, 26: 0, 30: 4, 50: 20}[max_lines]


def test_a_message_with_brackets_is_shown_as_it_is() -> None:
    assert any("tensor[3] [bold]x" in line for line in lines_of(Dashboard(TRAINING, ["tensor[3] [bold]x"]), 80))


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0] * 4 + [0.0] * 4 + [7.0] * 4, 6) == "██▁▁██"
    assert sparkline([1.0, 2.0], 20) == ""
    assert sparkline([2.0] * 10, 10) == "▁" * 10


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


def test_figures_as_people_read_them() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 100 << 20, 1 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "100 MiB",
        "1.0 GiB",
    ]
    assert [human_seconds(s) for s in (0, 59.6, 75, 7500, 200_000)] == ["0s", "1m00s", "1m15s", "2h05m", "2d07h"]
    assert [human_count(n) for n in (0, 12_345, 12_345_678, 2e9)] == ["0", "12,345", "12.3M", "2.0G"]
    assert [human_rate(r) for r in (0, 0.1234, 4.567, 78.91, 1234.5)] == ["0", "0.123", "4.57", "78.9", "1,234"]
