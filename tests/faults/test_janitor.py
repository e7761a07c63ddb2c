"""Whatever kills the driver, the janitor leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from torchspec.driver.actors import actor_environment
from torchspec.processes.janitor import MARK, marked_processes

CHILD = """
import multiprocessing, subprocess, time
lock = multiprocessing.get_context("spawn").Lock()
subprocess.Popen(["sleep", "600"])
print(lock._semlock.name.removeprefix("/"), flush=True)
time.sleep(600)
"""
DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from torchspec.processes.janitor import MARK, Janitor
mark, temp_dir, child = sys.argv[1:]
janitor = Janitor(mark, Path(temp_dir))
os.environ[MARK] = mark
# a child in a session of its own, which nothing else would stop, and a grandchild
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, start_new_session=True)
Path("/dev/shm/sglang_loads_" + mark + ".shm").write_bytes(b"x")
print("/dev/shm/sem." + process.stdout.readline(), end="", flush=True)
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
        [sys.executable, "-c", DRIVER, mark, str(temp_dir), CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    semaphore = Path(process.stdout.readline().strip())
    assert semaphore.exists()
    wait_until(lambda: len(marked_processes(mark)) == 3)  # child, grandchild and the child's resource tracker
    yield process, mark, temp_dir
    assert not semaphore.exists()
    process.kill()
    process.wait()


def test_an_actor_that_is_killed_leaves_its_temporary_files_to_the_janitor(driver):
    process, mark, temp_dir = driver
    code = "import tempfile; tempfile.mkdtemp(); print(tempfile.mkstemp()[1], flush=True); input()"
    environment = os.environ | actor_environment(mark, 1, temp_dir, temp_dir / "cache")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as actor:
        file = Path(actor.stdout.readline().strip())
        actor.kill()
    assert file.exists() and file.parent == temp_dir
    process.stdin.write("close\n")
    process.stdin.flush()
    process.stdout.readline()
    assert_clean(mark, temp_dir)


SPAWNED = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name.removeprefix("/"), flush=True)
time.sleep(600)
"""
ACTOR = f"""
import multiprocessing, os, subprocess, sys, tempfile, time
from torchspec.processes.janitor import start_janitor
janitor = start_janitor("worker-0")
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, tempfile.mkdtemp(), os.environ["TMPDIR"], flush=True)
multiprocessing.get_context("spawn").Process(target=exec, args=({SPAWNED!r},)).start()
time.sleep(600)
"""


@contextlib.contextmanager
def start_actor(mark: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {MARK: mark, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", ACTOR], env=environment, stdout=subprocess.PIPE, text=True) as actor:
        try:
            yield actor
        finally:
            actor.kill()


def test_an_actors_janitor_outlives_it_and_sweeps_its_children_wherever_the_driver_is(tmp_path):
    """As Ray ends an actor: its direct children first, all of them, then itself."""
    mark = f"test{os.getpid()}{time.monotonic_ns()}"
    with start_actor(mark, tmp_path) as actor:
        child, file, folder = actor.stdout.readline().split()
        assert Path(file).parent == Path(folder) and Path(folder).parent == tmp_path
        semaphore = Path("/dev/shm") / f"sem.{actor.stdout.readline().strip()}"
        assert semaphore.exists()
        direct = {process.pid for process in psutil.Process(actor.pid).children()}
        assert len(direct) == 3 and int(child) in direct  # child, spawned process and resource tracker
        assert set(marked_processes(mark)) == {actor.pid, *direct}, "Ray would end its janitor with it"
        for pid in direct:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not marked_processes(mark) and not Path(folder).exists())
    assert not semaphore.exists()


def test_a_new_incarnation_is_left_alone_by_the_janitor_of_the_one_before(tmp_path):
    mark = f"test{os.getpid()}{time.monotonic_ns()}"
    with start_actor(mark, tmp_path) as old, start_actor(mark, tmp_path) as new:
        _, _, old_folder = old.stdout.readline().split()
        _, _, new_folder = new.stdout.readline().split()
        semaphore = Path("/dev/shm") / f"sem.{new.stdout.readline().strip()}"
        old.kill()
        wait_until(lambda: not Path(old_folder).exists())
        assert new.poll() is None and Path(new_folder).exists()
        assert semaphore.exists()
        assert set(marked_processes(mark)) == {new.pid, *(p.pid for p in psutil.Process(new.pid).children())}
    wait_until(lambda: not marked_processes(mark) and not Path(new_folder).exists())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
    wait_until(lambda: not marked_processes(mark) and not temp_dir.exists())
    assert_clean(mark, temp_dir)


def test_other_processes_are_left_alone(driver):
    """Their semaphores too, which look like ours."""
    process, mark, _ = driver
    semaphore = Path(f"/dev/shm/sem.mp-{mark}")
    semaphore.touch()
    with subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: mark + "x"}) as bystander:
        process.stdin.write("close\n")
        process.stdin.flush()
        process.stdout.readline()
        assert bystander.poll() is None and semaphore.exists()
        semaphore.unlink()
        bystander.kill()
