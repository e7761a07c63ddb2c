"""What is printed while a run goes on: a picture on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.clock import Clock
from tests.unit.cli.statuses import COUNTING, STARTING, TRAIN, TRAINING
from torchspec.cli.live import HEARTBEAT_SECONDS, LiveView, PlainView, open_view
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus
from torchspec.driver.supervise import RunFailed


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
        with open_view(MonitorConfig.model_validate({"live": live}), console) as view:
            assert type(view.shown) is kind


def test_the_log_has_all_that_was_said_and_how_it_ended(tmp_path: Path, output: io.StringIO) -> None:
    log = tmp_path / "run" / "logs" / "driver.log"

    def run(end: Exception) -> None:
        with open_view(MonitorConfig(every_steps=10), Console(file=output)) as view:
            view.message("reading the prompts")
            view.log_to(log)
            view.message("worker-1 died", secret="#token=abc")
            view.status(at_step(20))
            raise end

    with pytest.raises(RunFailed):
        run(RunFailed("trainer rank 0 failed: it ate itself; continue with: torchspec resume run"))
    lines = [line.partition("] ")[2] for line in log.read_text().splitlines()]
    assert [line.split(" · ")[0] for line in lines] == [
        "reading the prompts",
        "worker-1 died",
        "training",
        "step 20/1,000",
        "error: trainer rank 0 failed: it ate itself; continue with: torchspec resume run",
    ]
    assert "worker-1 died#token=abc" in output.getvalue() and "error" not in output.getvalue()
    with pytest.raises(KeyError):
        run(KeyError("a mistake of ours"))
    assert log.read_text().startswith("[    0s] reading") and "Traceback" in log.read_text()


PRINTS = """
import sys
from rich.console import Console
from torchspec.cli.live import PlainView, outlive_readers
outlive_readers()
view = PlainView(1, Console(), lambda: 0.0)
for number in range(3):
    view.message(f"said {number}")
    print("printed", number, flush=True)
    print("complained", number, file=sys.stderr)
    input()
Console().print("the summary")
open(sys.argv[1], "w").write("went on")
"""


def unheard(folder: Path, **output: Any) -> tuple[int, str]:
    """A program that prints, of which nobody reads more than the first line; its exit code and what it did after."""
    process = subprocess.Popen([sys.executable, "-c", PRINTS, folder / "done"], stdin=subprocess.PIPE, **output)
    assert process.stdin is not None
    if process.stdout is not None:
        assert process.stdout.readline() == b"[    0s] said 0\n"
        process.stdout.close()
    try:
        process.stdin.write(b"\n" * 3)
        process.stdin.close()
        return process.wait(30), (folder / "done").read_text()
    finally:
        process.kill()


def test_output_whose_reader_is_gone_ends_nothing(tmp_path: Path) -> None:
    assert unheard(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) == (0, "went on")


def test_output_on_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert unheard(tmp_path, stdout=full, stderr=full) == (0, "went on")


def test_a_terminal_that_has_vanished_ends_nothing(tmp_path: Path) -> None:
    master, terminal = os.openpty()
    os.close(master)
    assert unheard(tmp_path, stdout=terminal, stderr=terminal) == (0, "went on")
    os.close(terminal)


def test_output_that_was_closed_before_ends_nothing(tmp_path: Path) -> None:
    assert unheard(tmp_path, preexec_fn=lambda: (os.close(1), os.close(2))) == (0, "went on")


LOGS = """
import sys
from pathlib import Path
from torchspec.cli.live import open_view
from torchspec.config.schema import MonitorConfig
with open_view(MonitorConfig()) as view:
    view.log_to(Path(sys.argv[1]))
    view.message("worker-1 died")
"""


def test_a_log_that_is_the_output_says_everything_once(tmp_path: Path) -> None:
    """As of a run in the background."""
    log = tmp_path / "driver.log"
    for output, said in ((log, 1), (tmp_path / "other", 2)):
        with output.open("w") as file:
            subprocess.run([sys.executable, "-c", LOGS, log], stdout=file, check=True, timeout=60)
        assert log.read_text().count("worker-1 died") == said and output.read_text().count("worker-1 died") == 1
