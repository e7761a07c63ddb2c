"""What a person sees while a run trains: a live picture on a terminal, plain lines anywhere else, and in the run's log.

All views are told the same: ``status`` about twice a second, ``message`` for each event, ``close`` at the end.

Output never ends a run: what cannot be written, because a reader has gone, a terminal has vanished or a disk is full,
is left out.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from torchspec.cli.dashboard import Dashboard, phase_text
from torchspec.cli.units import human_count, human_rate, human_seconds
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport
from torchspec.data.conversations import printable
from torchspec.driver.supervise import RunFailed

HEARTBEAT_SECONDS = 15.0
"""Plain lines: say so often what is going on when nothing else was said."""
LOSSES_KEPT = 2000
EVENTS_KEPT = 50


class Lossy(io.FileIO):
    """A file that leaves out what it cannot take."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _as_text(raw: Lossy, line_buffering: bool = True) -> io.TextIOWrapper:
    writer = io.BufferedWriter(raw)
    return io.TextIOWrapper(writer, encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering)


def outlive_readers() -> None:
    """From now on, what this process writes to its output is left out where it cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before
            setattr(sys, name, _as_text(Lossy(os.devnull, "w")))
        elif stream is getattr(sys, f"__{name}__"):  # or else somebody has put another in its place
            stream.flush()
            setattr(sys, name, _as_text(Lossy(stream.fileno(), "w", closefd=False), stream.line_buffering))


def open_view(config: MonitorConfig, console: Console | None = None) -> LoggedView:
    """The view that ``monitor.live`` asks for, and the run's log beside it."""
    console = console or Console(highlight=False, force_terminal=True if config.live == "on" else None)
    if config.live == "on" or (config.live == "auto" and console.is_interactive):
        return LoggedView(LiveView(console), config.every_steps)
    return LoggedView(PlainView(config.every_steps, console), config.every_steps)


class LoggedView:
    """A view, and a log of plain lines that goes on whatever becomes of the output. A context, whose end is logged."""

    def __init__(self, shown: LiveView | PlainView, every_steps: int):
        self.shown, self._before = shown, io.StringIO()
        self._log = PlainView(every_steps, Console(file=self._before))

    def log_to(self, path: Path) -> None:
        """Log to ``path``, whose folder is made, what was said so far, too; unless the output is that file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _as_text(Lossy(os.devnull if _is_output(path) else path, "a"))
        file.write(self._before.getvalue())
        self._log.say_in(file)

    def status(self, status: RunStatus) -> None:
        self.shown.status(status)
        self._log.status(status)

    def message(self, text: str, secret: str = "") -> None:
        self.shown.message(text + secret)
        self._log.message(text)

    def __enter__(self) -> LoggedView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.shown.close()
        if isinstance(error, (RunFailed, ValueError)):
            self._log.message(f"error: {error}")
        elif isinstance(error, Exception):
            self._log.message("".join(traceback.format_exception(error)).rstrip())
        elif error is not None:
            self._log.message("interrupted twice: ended at once")
        self._log.close()


def _is_output(path: Path) -> bool:
    """Whether standard output is a file, as of a run in the background."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), path.stat())
    except OSError:  # it is not there yet
        return False


class LiveView:
    """Redraws the dashboard in place; it follows the terminal's size, and the last picture stays."""

    def __init__(self, console: Console):
        self._console = console
        self._events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self._losses: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._status: RunStatus | None = None
        self._live = Live(get_renderable=self._picture, console=console)
        self._live.start()

    def status(self, status: RunStatus) -> None:
        before = self._status.last_step if self._status else None
        if status.last_step is not None and status.last_step != before:
            self._losses.append(status.last_step.loss)
        self._status = status

    def message(self, text: str) -> None:
        self._events.append(printable(text))

    def close(self) -> None:
        self._live.stop()

    def _picture(self) -> RenderableType:
        if self._status is None:
            return Text("\n".join(self._events) or "starting", style="dim")
        return Dashboard(self._status, tuple(self._events), tuple(self._losses), self._console.height - 1)


class PlainView:
    """One line for every ``every_steps`` steps, each held-out evaluation, phase and event, and a heartbeat.

    A thread of its own sees to the heartbeat: starting everything takes long, and nobody calls meanwhile.
    """

    def __init__(self, every_steps: int, console: Console, clock: Callable[[], float] = time.monotonic):
        self._every_steps = every_steps
        self._console = console
        self._clock = clock
        self._started = self._spoke = clock()
        self._phase = ""
        self._step = 0
        self._heldout: StepReport | None = None
        self._status: RunStatus | None = None
        self._doing = "starting"
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def status(self, status: RunStatus) -> None:
        self._status = status
        phase = phase_text(status)
        if phase != self._phase:
            self._phase = phase
            self._say(phase)
        self._step = min(self._step, status.step)  # steps may be undone
        if status.last_step is not None and status.step // self._every_steps > self._step // self._every_steps:
            self._step = status.step
            self._say(step_line(status, status.last_step))
        if status.last_heldout is not None and status.last_heldout != self._heldout:
            self._heldout = status.last_heldout
            self._say(f"held-out at step {self._heldout.step:,}: {_quality(self._heldout)}")

    def message(self, text: str) -> None:
        self._doing = text
        self._say(text)

    def heartbeat(self) -> None:
        """Say what is going on, if nothing was said for a while."""
        if self._clock() - self._spoke >= HEARTBEAT_SECONDS:
            self._say(f"still {self._doing}" if self._status is None else heartbeat_line(self._status))

    def say_in(self, file: TextIO) -> None:
        """Write to ``file`` from now on."""
        self._console.file = file

    def close(self) -> None:
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(1.0):
            self.heartbeat()

    def _say(self, line: str) -> None:
        self._spoke = self._clock()
        self._console.file.write(f"[{human_seconds(self._spoke - self._started):>6}] {printable(line)}\n")
        self._console.file.flush()


def step_line(status: RunStatus, report: StepReport) -> str:
    """A step in one line."""
    parts = [
        f"step {report.step:,}/{status.total_steps:,}",
        _quality(report),
        f"lr {report.learning_rate:.2e}",
        f"{human_rate(status.training_samples_per_s)} samples/s",
    ]
    if status.eta_seconds is not None:
        parts.append(f"{human_seconds(status.eta_seconds)} left")
    return " · ".join(parts)


def heartbeat_line(status: RunStatus) -> str:
    """What has been done so far, in one line; it moves before the first step, too."""
    samples = sum(worker.samples for worker in status.workers)
    tokens = sum(worker.tokens for worker in status.workers)
    answers = sum(worker.answer_tokens for worker in status.workers)
    parts = [f"{phase_text(status)}, step {status.step:,}/{status.total_steps:,}"]
    if status.workers:
        parts.append(f"{human_count(samples)} samples captured ({human_count(tokens)} tokens)")
        parts.append(f"{human_count(answers)} answer tokens written")
        parts.append(f"{human_rate(status.inference_tokens_per_s)} tokens/s")
        parts.append(f"{status.queue_depth:,} samples ready")
    return " · ".join(parts)


def _quality(report: StepReport) -> str:
    accuracy = " ".join(f"{a:.2f}" for a in report.full_accuracy)
    return f"loss {report.loss:.3f} · accept length {report.accept_length:.2f} · accuracy {accuracy}"
