"""Child processes that cannot outlive the process that started them.

    this process <--pidfd-- guard --PR_SET_PDEATHSIG--> command (a session of its own)

Each command runs under a small *guard* process. The guard watches both sides: when the starting process ends in
whatever way, ``kill -9`` included, it ends the command's whole process group; should the guard itself be killed, the
kernel kills the command. PR_SET_PDEATHSIG on the command alone would not do: it fires when the *thread* that forked
ends, and setting it between fork and exec of a process with threads can deadlock. The guard has one thread.

Standard library only, no import of ours: the guard runs this very file in isolated mode and starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

GRACE_SECONDS = 5.0
"""What a command gets between SIGTERM and SIGKILL."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildProcess:
    """One supervised command, its output appended to ``log_path``, whose folder is made; ``env`` is ours by default."""

    def __init__(self, command: Sequence[str], log_path: Path, env: dict[str, str] | None = None):
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._guard.pid

    @property
    def returncode(self) -> int | None:
        """The command's exit status (128 + the signal that ended it), None while it runs."""
        return self._guard.poll()

    def alive(self) -> bool:
        return self.returncode is None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after GRACE_SECONDS, to the command's process group. Returns when all is gone.

        That a guard or a command was stopped (SIGSTOP) makes no difference.
        """
        self._guard.terminate()
        self._guard.send_signal(signal.SIGCONT)
        try:
            self._guard.wait(2 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # and so the kernel the command
            self._guard.wait()

    def log_tail(self, lines: int = 10) -> str:
        with self.log_path.open(errors="replace") as log:
            return "".join(deque(log, maxlen=lines))


class _Stop(Exception):
    """SIGTERM arrived at the guard."""


def _stop(*_: object) -> None:
    raise _Stop


def _guard(parent: int, command: list[str]) -> int:
    """Run ``command`` until it ends, SIGTERM comes, or ``parent`` is gone. Returns the command's exit status."""
    parent_fd = os.pidfd_open(parent)
    guard = os.getpid()
    if os.getppid() != parent:  # it ended before we looked, and its number may be someone else's by now
        return 1
    libc = ctypes.CDLL(None)

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # the guard ended before prctl
            os._exit(1)

    child = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_guard)
    child_fd = os.pidfd_open(child.pid)
    try:
        signal.signal(signal.SIGTERM, _stop)
        select.select([child_fd, parent_fd], [], [])
    except _Stop:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The child is not reaped before the last killpg, so the group's number cannot have been given to another.
    if not select.select([child_fd], [], [], 0)[0]:
        os.killpg(child.pid, signal.SIGTERM)
        select.select([child_fd], [], [], GRACE_SECONDS)
    os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
