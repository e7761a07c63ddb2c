"""Cleans up after a process, however it ended: a janitor that outlives it.

A driver, and each actor on whatever node, starts its janitor first and keeps a pipe to it open. When the pipe closes -
the process has ended, or was killed with ``kill -9``, or Ray died on its node - the janitor kills every process of this
user that still carries the mark in its environment (Ray, SGLang and Mooncake children inherit it), removes what SGLang
and multiprocessing left in ``/dev/shm``, and deletes the temporary folder, where all of them have their temporary
files. An actor's mark begins with its driver's, so that the driver's janitor sweeps the actors of its machine, too.

Standard library only, so that it starts at once and costs little.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torchspec.processes.leftovers import SHARED_MEMORY, remove_shared_memory_leftovers

MARK = "TORCHSPEC_RUN_MARK"
"""Environment variable that every process of a run inherits, from its driver or from an actor."""


class Janitor:
    """The side of the process that may die: start it before anything else, close it after everything else."""

    def __init__(self, mark: str, temp_dir: Path):
        environment = {k: v for k, v in os.environ.items() if k != MARK}  # it must not find itself
        starter = subprocess.Popen(
            [sys.executable, "-m", "torchspec.processes.janitor", mark, str(temp_dir), str(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
            env=environment,
        )
        assert starter.stdin is not None and starter.stdout is not None
        self._stdin, self._stdout = starter.stdin, starter.stdout
        starter.wait()

    def close(self) -> None:
        """Sweep now, and wait until all is clean."""
        self._stdin.close()
        self._stdout.read()


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
    own, of_actors = f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                variables = (entry / "environ").read_bytes().split(b"\0")
                if any(variable == own or variable.startswith(of_actors) for variable in variables):
                    pids.append(int(entry.name))
    return pids


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
    mark, temp_dir, since = sys.argv[1:]
    if os.fork():  # Ray may end the children of an actor with it, so this must be nobody's
        os._exit(0)
    sys.stdin.buffer.read()  # returns when the process that started it is gone
    sweep(mark, Path(temp_dir), float(since))


if __name__ == "__main__":
    main()
