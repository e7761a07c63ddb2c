"""The janitor of a process that goes on: who was stopped is woken, and the two watch each other. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from torchspec.processes.janitor import MARK, Janitor, is_stopped, wake_the_stopped

OWNER = """
import sys
from pathlib import Path
from torchspec.processes import janitor
janitor.LOOK_SECONDS = 0.1
ours = janitor.Janitor(sys.argv[1], Path(sys.argv[2]))
for _ in sys.stdin:
    print(ours._pid, flush=True)
ours.close()
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def mark() -> str:
    return f"test{os.getpid()}{time.monotonic_ns()}"


@pytest.fixture
def sleeper(mark: str) -> Iterator[psutil.Process]:
    """A process of the run."""
    with subprocess.Popen(["sleep", "600"], env=os.environ | {MARK: mark}) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_who_is_stopped_for_long_is_woken_and_others_are_left_alone(mark: str, sleeper: psutil.Process) -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        for pid in (sleeper.pid, bystander.pid):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: is_stopped(pid))
        looks = wake_the_stopped(mark, wake_the_stopped(mark, {}))
        assert looks == {sleeper.pid: 2} and is_stopped(sleeper.pid)
        sleeper.resume()
        wait_until(lambda: not is_stopped(sleeper.pid))
        assert wake_the_stopped(mark, looks) == {}, "it has gone on by itself: counted from the start"
        sleeper.suspend()
        wake_the_stopped(mark, looks)
        wait_until(lambda: not is_stopped(sleeper.pid))
        assert is_stopped(bystander.pid)
        bystander.kill()


@pytest.fixture
def owner(mark: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OWNER, mark, folder], **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


def janitor_of(owner: subprocess.Popen[str]) -> int:
    assert owner.stdin is not None and owner.stdout is not None
    owner.stdin.write("which\n")
    owner.stdin.flush()
    return int(owner.stdout.readline())


def end(owner: subprocess.Popen[str]) -> int:
    assert owner.stdin is not None
    owner.stdin.close()
    return owner.wait(30)


def test_a_janitor_that_is_killed_is_replaced_and_one_that_is_stopped_goes_on(
    owner: subprocess.Popen[str], sleeper: psutil.Process, tmp_path: Path
) -> None:
    first = janitor_of(owner)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: janitor_of(owner) != first)
    second = janitor_of(owner)
    os.kill(second, signal.SIGSTOP)
    time.sleep(0.5)  # it may not be there yet
    wait_until(lambda: not is_stopped(second))
    owner.kill()  # it sweeps as the first would have
    sleeper.wait(30)
    wait_until(lambda: not (tmp_path / "scratch").exists())


def test_an_orderly_end_waits_for_no_janitor_that_cannot_sweep(
    owner: subprocess.Popen[str], sleeper: psutil.Process, tmp_path: Path
) -> None:
    os.kill(janitor_of(owner), signal.SIGSTOP)
    assert end(owner) == 0
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "scratch").exists()


def test_an_orderly_end_sweeps_itself_where_the_janitor_dies_meanwhile(
    mark: str, sleeper: psutil.Process, tmp_path: Path
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    janitor = Janitor(mark, folder)
    janitor._closing = True  # its watcher does not replace it
    os.kill(janitor._pid, signal.SIGKILL)
    janitor.close()
    assert not folder.exists()
    assert sleeper.status() == psutil.STATUS_ZOMBIE
