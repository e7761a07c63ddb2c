"""Whatever kills the driver, the janitor leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchspec.driver.janitor import MARK, marked_processes

DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from torchspec.driver.janitor import MARK, Janitor
mark, temp_dir = sys.argv[1:]
janitor = Janitor(mark, Path(temp_dir))
os.environ[MARK] = mark
# a child in a session of its own, which nothing else would stop, and a grandchild
subprocess.Popen([sys.executable, "-c", "import subprocess,time; subprocess.Popen(['sleep','600']); time.sleep(600)"],
                 start_new_session=True)
Path("/dev/shm/sglang_loads_" + mark + ".shm").write_bytes(b"x")
time.sleep(1)
print("ready", flush=True)
if sys.stdin.readline() == "close\\n":
    janitor.close()
    print("closed", flush=True)
"""


@pytest.fixture
def driver(tmp_path):
    mark = f"test{os.getpid()}{time.monotonic_ns()}"
    temp_dir = tmp_path / "scratch"
    temp_dir.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, mark, str(temp_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    assert len(marked_processes(mark)) >= 2
    yield process, mark, temp_dir
    process.kill()
    process.wait()


def assert_clean(mark: str, temp_dir: Path) -> None:
    assert marked_processes(mark) == []
    assert not temp_dir.exists()
    assert not Path(f"/dev/shm/sglang_loads_{mark}.shm").exists()


def test_after_an_orderly_end(driver):
    process, mark, temp_dir = driver
    process.stdin.write("close\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    assert_clean(mark, temp_dir)


def test_after_kill_9(driver):
    process, mark, temp_dir = driver
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (marked_processes(mark) or temp_dir.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_clean(mark, temp_dir)


def test_other_processes_are_left_alone(driver):
    process, mark, _ = driver
    with subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: mark + "x"}) as bystander:
        process.stdin.write("close\n")
        process.stdin.flush()
        process.stdout.readline()
        assert bystander.poll() is None
        bystander.kill()
