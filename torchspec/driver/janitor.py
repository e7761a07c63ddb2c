"""Cleans up after a driver, however it ended: a child process that outlives it.

The driver starts the janitor first and keeps a pipe to it open. When the pipe closes - the driver has ended, or was
killed with ``kill -9`` - the janitor kills every process of this user that still carries the run's mark in its
environment (Ray, SGLang and Mooncake children inherit it), removes what SGLang left in ``/dev/shm``, and deletes the
run's temporary folder, where all of them have their temporary files.

Standard library only, so that it starts at once and costs little.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from torchspec.inference.leftovers import remove_shared_memory_leftovers

MARK = "TORCHSPEC_RUN_MARK"
"""Environment variable that every process of a run inherits from its driver."""


class Janitor:
    """The driver's side: start it before anything else, close it after everything else."""

    def __init__(self, mark: str, temp_dir: Path):
        environment = {k: v for k, v in os.environ.items() if k != MARK}  # it must not find itself
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchspec.driver.janitor", mark, str(temp_dir), str(time.time())],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
            env=environment,
        )

    def close(self) -> None:
        """Sweep now, and wait until all is clean."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def marked_processes(mark: str) -> list[int]:
    """PIDs, other than this process, whose environment carries the mark."""
    needle = f"{MARK}={mark}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


def sweep(mark: str, temp_dir: Path, since: float) -> None:
    """Kill the run's processes, then remove their files."""
    for _ in range(20):  # a dying parent may just have started a child
        pids = marked_processes(mark)
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                if not _is_resource_tracker(pid):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    remove_shared_memory_leftovers(since)
    shutil.rmtree(temp_dir, ignore_errors=True)


def _is_resource_tracker(pid: int) -> bool:
    """Whether it is Python's, which removes the semaphores of the processes it serves and ends when they are gone."""
    return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def main() -> None:
    mark, temp_dir, since = sys.argv[1:]
    sys.stdin.buffer.read()  # returns when the driver is gone
    sweep(mark, Path(temp_dir), float(since))


if __name__ == "__main__":
    main()
