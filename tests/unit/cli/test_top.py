"""``torchspec top``: what it draws, what its keys do, and that it leaves a real terminal as it was."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
from textual.pilot import Pilot
from textual.widgets import ContentSwitcher, Static

from tests.simulation.pipeline import Setup, Simulation
from tests.simulation.simulated_run import SimulatedRun
from tests.unit.cli.commands import rendered
from torchspec.cli import top_view
from torchspec.cli.arguments import newest_run
from torchspec.cli.top_app import PoolTable, TopApp
from torchspec.cli.units import human_count, human_rate
from torchspec.monitor.snapshot import read_latest
from torchspec.monitor.watch import RunWatch
from torchspec.run_folder import this_process

SETUP = Setup(workers=12, engine_seconds=4.0, warm_up=5.0, pause_every=20, store_samples=400, window=600)


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    """A run that lives as long as the test, with a worker that has died."""
    run = SimulatedRun(tmp_path / "watched", Simulation(SETUP, now=time.time() - 200))
    run.follow(150)
    run.kill_worker(0)
    run.follow(50)
    (run.folder / "handle.json").write_text(json.dumps(this_process()))
    return run


def drawn(picture: object, width: int) -> list[str]:
    return rendered(picture, width, height=24).splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_summary_answers_at_any_width(run: SimulatedRun, width: int) -> None:
    look = RunWatch(run.folder).look()
    snapshot = look.snapshot
    assert snapshot is not None and snapshot.status.last_step is not None and snapshot.status.last_heldout is not None
    lines = drawn(top_view.summary(look, "watched", False), width)
    assert len(lines) <= 15 and max(map(len, lines)) <= width
    text = " ".join(lines)
    assert "watched" in text and "! 1 worker lost" in text and "Inference is the bottleneck" in text
    assert f"▲ inference {human_rate(snapshot.status.inference_samples_per_s)}/s" in text
    assert f"step {snapshot.status.step:,} of {snapshot.status.total_steps:,}" in text and "left" in text
    for figure in (snapshot.status.training_tokens_per_s, snapshot.status.training_samples_per_s):
        assert human_rate(figure) in text
    for report in (snapshot.status.last_step, snapshot.status.last_heldout):
        assert f"{report.loss:.3f}" in text and f"{report.accept_length:.2f}" in text
    assert sum("█" in line for line in lines) >= 4, "curves"


def test_curves_follow_their_values() -> None:
    plot = drawn(top_view.Plot("x", "", [([float(i) for i in range(100)], "red")], 6), 48)
    rows = [line[8:] for line in plot[1:]]
    assert len(rows) == 5 and plot[1].startswith("   99.0") and plot[-1].startswith("      0")
    first = [min(i for i, dots in enumerate(row) if dots != "⠀") for row in rows]
    assert first == sorted(first, reverse=True) and first[-1] == 0 and first[0] > 25, "it rises from left to right"
    assert "no data yet" in drawn(top_view.Plot("x", "", [([], "red")], 6), 48)[1]


def piloted(
    run: SimulatedRun, script: Callable[[TopApp, Pilot[None]], object], size: tuple[int, int] = (80, 24)
) -> None:
    async def go() -> None:
        app = TopApp(run.folder, every_seconds=0.05)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.2)
            await script(app, pilot)  # type: ignore[misc]

    asyncio.run(go())


def column(app: TopApp, table: str, i: int) -> list[str]:
    shown = app.query_one(f"#{table}", PoolTable)
    return [str(shown.get_row_at(row)[i]) for row in range(shown.row_count)]


def test_keys_choose_the_view_and_the_order(run: SimulatedRun) -> None:
    async def script(app: TopApp, pilot: Pilot[None]) -> None:
        names = [f"worker-{i}" for i in range(12)]
        assert column(app, "workers", 0) == names and column(app, "workers", 1)[0] == "gone"
        await pilot.press("S")
        assert column(app, "workers", 0) == names[::-1]
        for _ in range(7):
            await pilot.press("s")
        samples = [int(n) for n in column(app, "workers", 7)]
        assert samples == sorted(samples, reverse=True) and len(set(samples)) > 1
        for key, view in zip("recw?", ("ranks", "events", "curves", "workers", "help"), strict=True):
            await pilot.press(key)
            assert app.query_one(ContentSwitcher).current == view
        await pilot.press("r")
        assert column(app, "ranks", 0) == ["0", "1"]
        await pilot.press("e")
        assert "worker-0 is gone" in str(app.query_one("#log", Static).render())

    piloted(run, script)


def test_it_follows_the_run_unless_paused(run: SimulatedRun) -> None:
    async def script(app: TopApp, pilot: Pilot[None]) -> None:
        def shown() -> str:
            return " ".join(str(line) for line in app.export_screenshot().split("&#160;"))

        await pilot.press("p")
        run.follow(40)
        latest = read_latest(run.folder)
        assert latest is not None
        step = f"step&#160;{latest.status.step:,}&#160;of"
        await pilot.pause(0.3)
        assert "PAUSED" in shown() and step not in app.export_screenshot()
        await pilot.press("p")
        await pilot.pause(0.3)
        assert step in app.export_screenshot() and "PAUSED" not in shown()
        assert human_count(latest.workers[5].report.samples) in column(app, "workers", 7)

    piloted(run, script)


def test_it_outlives_what_it_watches(run: SimulatedRun) -> None:
    async def script(app: TopApp, pilot: Pilot[None]) -> None:
        (run.folder / "handle.json").unlink()
        await pilot.pause(0.3)
        assert "Not&#160;running" in app.export_screenshot()
        (run.folder / "handle.json").write_text(json.dumps(this_process()))
        run.event("resumed", "the run goes on")
        await pilot.press("e")
        await pilot.pause(0.3)
        assert "the&#160;run&#160;goes&#160;on" in app.export_screenshot()
        await pilot.resize_terminal(200, 50)
        await pilot.pause(0.2)

    piloted(run, script)


def test_a_run_without_data_can_be_watched(tmp_path: Path) -> None:
    async def go() -> None:
        async with TopApp(tmp_path).run_test(size=(80, 24)) as pilot:
            for key in "wrecs":
                await pilot.press(key)
            assert "No&#160;data&#160;yet" in pilot.app.export_screenshot()

    asyncio.run(go())


class Terminal:
    """The command in a real pseudo-terminal, its screen as a person would see it."""

    def __init__(self, folder: Path, columns: int, lines: int):
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.Stream(self.screen)
        self.written = ""
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "torchspec.cli.main", "top", str(folder)],
            dimensions=(lines, columns),
            env={**os.environ, "TERM": "xterm-256color"},
            encoding="utf-8",
        )

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, "\n".join(self.screen.display)):
            assert time.monotonic() < deadline, "\n".join(self.screen.display)
            self._read()

    def end(self, seconds: float = 60) -> int:
        """Wait for the end; the exit code."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline
        self.child.close()
        assert self.child.exitstatus is not None
        return self.child.exitstatus

    def _read(self) -> bool:
        try:
            text = self.child.read_nonblocking(1 << 16, 0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.written += text
        self._stream.feed(text)
        return True


@pytest.fixture
def terminal(run: SimulatedRun) -> Iterator[Terminal]:
    terminal = Terminal(run.folder, 80, 24)
    yield terminal
    terminal.child.close(force=True)


@pytest.mark.parametrize("way", ["q", "ctrl-c", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_clean_afterwards(terminal: Terminal, way: str) -> None:
    terminal.wait_for("Inference is the bottleneck")
    terminal.wait_for(r"w Workers .* q Quit")
    if way == "q":
        terminal.child.setwinsize(40, 120)
        terminal.screen.resize(40, 120)
        terminal.child.send("r")
        terminal.wait_for(r"rank.*state.*tokens/s.*get p99")
        terminal.child.send("q")
    elif way == "ctrl-c":
        terminal.child.send("\x03")
    else:
        terminal.child.kill(getattr(signal, way))
    assert terminal.end() == 0
    for undone in ("\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l"):  # the screen before, the cursor, the mouse
        assert undone in terminal.written[-400:]
    assert "Traceback" not in terminal.written


def test_it_says_where_it_cannot_draw(run: SimulatedRun) -> None:
    command = [sys.executable, "-m", "torchspec.cli.main", "top", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "error: torchspec top draws on a terminal, and this is none: use torchspec status RUN, or --json there\n"
    )


def test_the_newest_running_run_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run is running"):
        newest_run(tmp_path)
    for age, (name, pid) in enumerate({"newer": os.getpid(), "older": os.getpid(), "dead": 2**22 + 1}.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        handle = tmp_path / name / "handle.json"
        handle.write_text(json.dumps(this_process() | {"pid": pid}))
        os.utime(handle, (time.time() - 100 * age,) * 2)
    os.utime(tmp_path / "dead" / "handle.json")
    assert newest_run(tmp_path) == tmp_path / "newer"
