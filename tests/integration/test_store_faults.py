"""What the store does when a part of it dies: bounded errors, nothing left behind. Real processes, real kills."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.exposed import open_sockets
from tests.integration.store_harness import Peer, RunningStore, running_store
from torchspec.contracts import TensorSpec
from torchspec.network import free_port
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import MissingObject, StoreUnavailable
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster

MIB = 1 << 20
TENSORS = {"x": TensorSpec((1024,), "int32")}
BOUND_SECONDS = 30
"""Far above what is seen (4 s dead, 20 s hung); what matters is that calls return."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningStore]:
    with running_store(tmp_path, 32 * MIB) as running:
        yield running


def put(store: HiddenStateStore, key: str) -> int:
    return store.put(key, store.allocate(TENSORS, timeout=5)).result(timeout=BOUND_SECONDS)


def assert_unavailable(call: Callable[[], object]) -> None:
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(BOUND_SECONDS)
    assert [type(error) for error in outcome] == [StoreUnavailable]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_master_is_reported_and_bounded(running: RunningStore, how: signal.Signals) -> None:
    store = HiddenStateStore(running.endpoint, MIB)
    put(store, "k")
    running.master_process().send_signal(how)
    if how == signal.SIGKILL:
        while running.master.alive():
            time.sleep(0.01)
    assert_unavailable(lambda: put(store, "late"))
    assert_unavailable(lambda: store.get("k", TENSORS))
    if how == signal.SIGKILL:
        assert_unavailable(lambda: store.remove("k", TENSORS))
        assert_unavailable(lambda: store.exists("k", TENSORS))
        assert_unavailable(running.master.usage)
        assert_unavailable(lambda: HiddenStateStore(running.endpoint, MIB))
    assert store._pool._holes == [(0, store._pool.capacity)]
    if how == signal.SIGSTOP:
        running.master_process().send_signal(signal.SIGCONT)
        put(store, "after")  # it comes back by itself
        assert store.exists("after", TENSORS)
    store.close()


def test_a_dead_node_is_reported_and_its_successor_takes_over(running: RunningStore) -> None:
    store = HiddenStateStore(running.endpoint, MIB)
    put(store, "k")
    running.node.kill()
    assert_unavailable(lambda: store.get("k", TENSORS))
    assert_unavailable(lambda: put(store, "late"))
    store.remove("k", TENSORS)
    running.start_node(32 * MIB)
    for attempt in range(200):  # until the master writes the dead node off, some puts are still sent there
        try:
            put(store, f"k{attempt}")
            break
        except StoreUnavailable:
            continue
    store.release(store.get(f"k{attempt}", TENSORS))
    store.close()


def test_a_port_in_use_names_the_knob(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"store\.master_port={port}"):
            MooncakeMaster(tmp_path / "log", port=port)
    master = MooncakeMaster(tmp_path / "log", port=port)
    assert master.endpoint.master == f"127.0.0.1:{port}"
    master.stop()
    MooncakeMaster(tmp_path / "log", port=port).stop()  # the port is free again at once


def test_a_race_for_the_port_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answers = iter([port])  # "free" when it was looked at
        monkeypatch.setattr("torchspec.store.master.free_port", lambda host: next(answers, None) or free_port(host))
        master = MooncakeMaster(tmp_path / "log")
    assert next(answers, None) is None
    assert master.endpoint.master != f"127.0.0.1:{port}"
    assert master.alive()
    master.stop()
    assert not master.alive()


def test_kill_9_of_the_parent_takes_the_master_down(tmp_path: Path) -> None:
    parent = Peer("master", str(tmp_path / "log"))
    endpoint = StoreEndpoint.from_json(parent.line())
    started = psutil.Process(parent.process.pid).children(recursive=True)
    assert any("mooncake_master" in process.name() for process in started)
    parent.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    for address in (endpoint.master, endpoint.metrics):
        host, port = address.split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)


def test_the_master_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    masters: list[MooncakeMaster] = []
    thread = threading.Thread(target=lambda: masters.append(MooncakeMaster(tmp_path / "log")))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert masters[0].alive()
    masters[0].stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_master_started_again_is_found_by_nodes_and_clients(running: RunningStore, how: signal.Signals) -> None:
    store = HiddenStateStore(running.endpoint, MIB)
    put(store, "before")
    running.master_process().send_signal(how)
    running.master.restart()
    deadline = time.monotonic() + BOUND_SECONDS
    while running.master.usage().capacity_bytes < 32 * MIB:  # the node mounts its memory anew, by itself
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises((MissingObject, StoreUnavailable)):  # the first call may meet the old connection's end
        store.get("before", TENSORS)
    with pytest.raises(MissingObject):
        store.get("before", TENSORS)
    put(store, "after")
    store.release(store.get("after", TENSORS))
    for process in (psutil.Process(), psutil.Process(running.node.process.pid), running.master_process()):
        assert open_sockets(process) == set(), "what they have bound anew is as confined"
    assert running.master.usage().objects == 1
    store.remove_all("aft")
    assert running.master.usage().objects == 0
    store.close()
