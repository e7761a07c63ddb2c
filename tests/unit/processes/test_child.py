"""Supervised children, with plain commands in place of the store's master."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from torchspec.processes.child import ChildProcess

FAMILY = "sleep 600 & echo started; sleep 600"


def family_of(process: ChildProcess, log: Path) -> list[psutil.Process]:
    """The guard, the shell and its two sleeps."""
    while "started" not in log.read_text() or len(psutil.Process(process.pid).children(recursive=True)) < 3:
        assert process.alive()
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def test_output_and_exit_status(tmp_path: Path) -> None:
    child = ChildProcess(
        ["sh", "-c", "echo out; echo err >&2; echo $WORD; exit 7"], tmp_path / "a" / "log", {"WORD": "w"}
    )
    child._guard.wait(30)
    assert child.returncode == 7
    assert not child.alive()
    assert child.log_tail() == "out\nerr\nw\n"
    assert child.log_tail(1) == "w\n"


def test_a_signal_is_told_apart(tmp_path: Path) -> None:
    child = ChildProcess(["sh", "-c", "kill -9 $$"], tmp_path / "log")
    assert child._guard.wait(30) == 128 + signal.SIGKILL


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    child = ChildProcess(["sh", "-c", FAMILY], tmp_path / "log")
    family = family_of(child, tmp_path / "log")
    child.stop()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert child.returncode == 128 + signal.SIGTERM
    child.stop()  # again is fine


def test_a_deaf_command_is_killed(tmp_path: Path) -> None:
    child = ChildProcess(["sh", "-c", f"trap '' TERM; {FAMILY}; sleep 600"], tmp_path / "log")
    family_of(child, tmp_path / "log")
    child.stop()
    assert child.returncode == 128 + signal.SIGKILL


def test_the_command_dies_with_a_killed_guard(tmp_path: Path) -> None:
    child = ChildProcess(["sleep", "600"], tmp_path / "log")
    while not (command := psutil.Process(child.pid).children()) or command[0].name() != "sleep":
        pass
    os.kill(child.pid, signal.SIGKILL)
    assert psutil.wait_procs(command, timeout=10)[1] == []


def test_the_group_dies_with_a_killed_parent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path; from torchspec.processes.child import ChildProcess\n"
        "child = ChildProcess(['sh', '-c', sys.argv[2]], Path(sys.argv[1])); print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(log), FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guard = psutil.Process(int(parent.stdout.readline()))
    while len(guard.children(recursive=True)) < 3:
        pass
    family = [guard, *guard.children(recursive=True)]
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_guard_that_was_stopped_is_no_end_of_the_wait(tmp_path: Path) -> None:
    child = ChildProcess(["sh", "-c", FAMILY], tmp_path / "log")
    family = family_of(child, tmp_path / "log")
    for process in family:
        process.suspend()
    child.stop()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_guard_that_is_stopped_again_and_again_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchspec.processes.child.GRACE_SECONDS", 0.2)
    child = ChildProcess(["sleep", "600"], tmp_path / "log")
    while not (command := psutil.Process(child.pid).children()) or command[0].name() != "sleep":
        pass
    os.kill(child.pid, signal.SIGSTOP)
    send = child._guard.send_signal
    monkeypatch.setattr(child._guard, "send_signal", lambda n: send(signal.SIGSTOP if n == signal.SIGCONT else n))
    child.stop()
    assert child.returncode == -signal.SIGKILL
    assert psutil.wait_procs(command, timeout=10)[1] == []
