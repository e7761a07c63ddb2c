"""How engines start, fail and end: loudly, quickly, and without leaving processes or shared memory behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.engine_harness import EngineProcess
from tests.integration.store_harness import RunningStore, running_store
from torchspec.processes.leftovers import SHARED_MEMORY, remove_shared_memory_leftovers


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    with running_store(tmp_path_factory.mktemp("store"), 32 << 20) as running:
        yield running


@pytest.fixture
def start(store: RunningStore, target_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def start(task: str, **environment: str) -> EngineProcess:
        started.append(EngineProcess(task, store.endpoint, target_path, **environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


def sglang_files(pids: list[int]) -> set[str]:
    """Names of the load tables that these processes use. Other engines of this machine have theirs."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return {entry.name for entry in SHARED_MEMORY.glob("sglang_loads_*") if str(entry) in maps}


def still_there(names: set[str]) -> set[str]:
    return {name for name in names if (SHARED_MEMORY / name).exists()}


def wait_until_gone(pids: list[int]) -> None:
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_an_engine_without_the_capture_plugin_is_refused(start) -> None:  # type: ignore[no-untyped-def]
    refused = start("stop", SGLANG_PLUGINS="torchspec_sgl_kernel,torchspec_cpu").read()
    assert "capture plugin did not load" in refused["error"] and "SGLANG_PLUGINS" in refused["error"]
    assert refused["children"] == []


@pytest.mark.parametrize(
    ("task", "reason"),
    [pytest.param("scheduler-dies", "ended", marks=pytest.mark.slow), ("scheduler-hangs", "stopped for 3 s")],
)
def test_a_dead_scheduler_fails_every_call_and_stop_leaves_nothing(start, task: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    process = start(task)
    pids = process.read()["pids"]
    assert [psutil.Process(pid).cmdline()[0] for pid in pids] == ["sglang::scheduler"], "token ids need no detokenizer"
    made = sglang_files(pids)
    assert reason in process.read()["error"]
    assert process.read()["stopped"]
    wait_until_gone(pids)
    assert process.process.wait() == 0
    assert made and not still_there(made)


def test_kill_9_of_the_parent_leaves_no_process_and_what_it_left_can_be_removed(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    began = time.time()
    process = start("wait", TMPDIR=str(tmp_path))
    ready = process.read()
    assert len(ready["answer"][0]) == 4
    made = sglang_files(ready["pids"])
    assert made and not set(remove_shared_memory_leftovers(began)) & made  # in use: not garbage yet
    os.kill(process.process.pid, signal.SIGKILL)
    wait_until_gone(ready["pids"])
    remove_shared_memory_leftovers(began)
    assert not still_there(made)
    assert list(tmp_path.glob("torchspec-*/capture")), "its sockets lie in the temporary folder, which can be a run's"
