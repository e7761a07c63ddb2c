"""Cleans up after a process, however it ended: a janitor that outlives it. Meanwhile it wakes what was put to sleep.

A driver, and each actor on whatever node, starts its janitor first and keeps a pipe to it open. When the pipe closes -
the process has ended, or was killed with ``kill -9``, or Ray died on its node - the janitor kills every process of this
user that still carries the mark in its environment (Ray, SGLang and Mooncake children inherit it), removes what SGLang
and multiprocessing left in ``/dev/shm``, and deletes the temporary folder, where all of them have their temporary
files. An actor's mark begins with its driver's, so that the driver's janitor sweeps the actors of its machine, too.

A process of the run that somebody has stopped (SIGSTOP) neither works nor ends: whoever waits for it would do so for
ever. The janitor lets it go on after a while. It stands back while its own process is stopped, as by Ctrl-Z: then all
of them are meant to be. The process and its janitor watch each other: a janitor that dies is replaced.

Standard library only, so that it starts at once and costs little.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from torchspec.processes.leftovers import SHARED_MEMORY, remove_shared_memory_leftovers

MARK = "TORCHSPEC_RUN_MARK"
"""Environment variable that every process of a run inherits, from its driver or from an actor."""


LOOK_SECONDS = 5.0
"""Between two looks for what was stopped, on both sides."""
LOOKS = 3
"""Who is found stopped so many times in a row is woken."""
_ANSWER_SECONDS = 30.0
"""What a janitor has to start, and what it has to sweep."""
_SWEPT = b"swept\n"


class Janitor:
    """The side of the process that may die: start it before anything else, close it after everything else."""

    def __init__(self, mark: str, temp_dir: Path):
        self._mark, self._temp_dir, self._since = mark, temp_dir, time.time()
        self._lock, self._closing = threading.Lock(), False
        self._start()
        threading.Thread(target=self._watch, name="watch-janitor", daemon=True).start()

    def close(self) -> None:
        """Sweep now, and wait until all is clean."""
        with self._lock:
            self._closing = True
        self._signal(signal.SIGCONT)
        self._stdin.close()
        answered = select.select([self._stdout], [], [], _ANSWER_SECONDS)[0]
        if not answered or self._stdout.readline() != _SWEPT:
            self._signal(signal.SIGKILL)
            sweep(self._mark, self._temp_dir, self._since)

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != MARK}  # it must not find itself
        arguments = self._mark, str(self._temp_dir), str(self._since), str(os.getpid())
        pid = b""
        while not pid:
            starter = subprocess.Popen(
                [sys.executable, "-m", "torchspec.processes.janitor", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
                env=environment,
            )
            assert starter.stdin is not None and starter.stdout is not None
            self._stdin, self._stdout = starter.stdin, starter.stdout
            if select.select([self._stdout], [], [], _ANSWER_SECONDS)[0]:
                pid = self._stdout.readline()
            else:
                starter.kill()
            starter.wait()
        self._pid = int(pid)

    def _watch(self) -> None:
        """Have another janitor when this one has died, and let it go on when it was stopped."""
        while True:
            died = select.select([self._stdout], [], [], LOOK_SECONDS)[0]
            with self._lock:
                if self._closing:
                    return
                if died:
                    self._start()
                else:
                    self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):  # it has just died
            os.kill(self._pid, number)


def start_janitor(name: str) -> Janitor:
    """Have what this actor leaves behind removed from whatever machine it is on, however it ends.

    Its children get a mark, and it a folder for temporary files, that no other incarnation of it has. Its named
    semaphores carry the mark: Ray ends Python's resource tracker, which should remove them, together with the actor.
    """
    folder = tempfile.mkdtemp(prefix="torchspec-")
    mark = os.environ[MARK] = f"{os.environ[MARK]}/{name}-{secrets.token_hex(4)}"
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # processes that multiprocessing starts from here on inherit this, too
    multiprocessing.current_process()._config["semprefix"] = f"/{_semaphores_of(mark)}"  # type: ignore[attr-defined]
    return Janitor(mark, Path(folder))


def marked_processes(mark: str) -> list[int]:
    """PIDs, other than this process, whose environment carries the mark, or that of an actor of it."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _carries(pid, mark)]


def _carries(pid: int, mark: str) -> bool:
    own, of_actors = f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode()
    with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(variable == own or variable.startswith(of_actors) for variable in variables)
    return False


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped a process (SIGSTOP), so that it neither works nor ends."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def wake_the_stopped(mark: str, looks: dict[int, int]) -> dict[int, int]:
    """Let go on who carries the mark and is found stopped once too often.

    Args:
        looks: how often each process was found so before, without a break; returns the same with this look.
    """
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    now = {pid: looks.get(pid, 0) + 1 for pid in pids if is_stopped(pid) and _carries(pid, mark)}
    for pid in [pid for pid, count in now.items() if count >= LOOKS]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)
    return now


def sweep(mark: str, temp_dir: Path, since: float) -> None:
    """Kill the run's processes, then remove their files."""
    clean_looks = 0
    for _ in range(20):
        pids = marked_processes(mark)
        clean_looks = 0 if pids else clean_looks + 1
        if clean_looks == 2:  # a dying parent may just have started a child, whose environment is not there yet
            break
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                if not _is_resource_tracker(pid):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    remove_shared_memory_leftovers(since)
    for semaphore in SHARED_MEMORY.glob(f"sem.{_semaphores_of(mark)}-*"):
        semaphore.unlink(missing_ok=True)
    shutil.rmtree(temp_dir, ignore_errors=True)


def _semaphores_of(mark: str) -> str:
    """What the names of an actor's named semaphores begin with; those of its driver's other actors begin alike."""
    return f"torchspec-{mark.rpartition('#')[2].replace('/', '-')}"  # without the run's folder


def _is_resource_tracker(pid: int) -> bool:
    """Whether it is Python's, which removes the semaphores of the processes it serves and ends when they are gone."""
    return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def main() -> None:
    mark, temp_dir, since, owner = sys.argv[1:]
    if os.fork():  # Ray may end the children of an actor with it, so this must be nobody's
        os._exit(0)
    os.write(sys.stdout.fileno(), b"%d\n" % os.getpid())
    looks: dict[int, int] = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:  # it ends when the process that started it is gone
        looks = {} if is_stopped(int(owner)) else wake_the_stopped(mark, looks)
    sweep(mark, Path(temp_dir), float(since))
    with contextlib.suppress(OSError):  # nobody may be waiting
        os.write(sys.stdout.fileno(), _SWEPT)


if __name__ == "__main__":
    main()
