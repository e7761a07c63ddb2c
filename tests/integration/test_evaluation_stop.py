"""An evaluation that is interrupted, or killed, leaves no process and nothing in ``/dev/shm``."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from torchspec.processes.leftovers import SHARED_MEMORY

SERVE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore Ctrl-C
from torchspec.evaluation.serving import Job, serve
try:
    serve(Job(sys.argv[1], [[1, 2, 3]], 5000, "bfloat16", "cpu", 1, 1))
except KeyboardInterrupt:
    sys.exit(17)
"""


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temporary folder with a short name: paths of sockets have to fit into 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 17), (signal.SIGKILL, -9)])
def test_nothing_is_left_behind(target_path: Path, temp: Path, sent: signal.Signals, code: int) -> None:
    driver = psutil.Popen([sys.executable, "-c", SERVE, str(target_path)], env=os.environ | {"TMPDIR": str(temp)})
    _wait(lambda: _shared_memory(driver))
    family, files = driver.children(recursive=True), _shared_memory(driver)
    driver.send_signal(sent)
    assert driver.wait(60) == code
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not list(temp.iterdir())
    assert not [file for file in files if file.exists()]


def _shared_memory(driver: psutil.Process) -> set[Path]:
    """What SGLang's scheduler maps: other engines on this machine have files there, too."""
    for child in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a short-lived helper
            if child.name() == "sglang::scheduler":
                return {Path(m.path) for m in child.memory_maps() if m.path.startswith(f"{SHARED_MEMORY}/sglang_")}
    return set()


def _wait(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
