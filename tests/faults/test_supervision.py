"""What the driver's supervision does with real processes that are killed or stopped, on a real Ray, without a run."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from torchspec.config.schema import RecoveryConfig
from torchspec.driver.controller_client import ControllerClient, ControllerLost
from torchspec.driver.store import StoreSupervisor
from torchspec.driver.supervise import Pulse, RunFailed
from torchspec.network import LOOPBACK
from torchspec.store.client import StoreNode
from torchspec.store.master import MooncakeMaster

LOOK_SECONDS = 0.1
LONGEST_LOOK_SECONDS = 1.5
"""Nobody else is watched meanwhile, so a look at one part must be quick, also on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:  # short, for Ray's sockets
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            object_store_memory=80 << 20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


# ---- the controller ----


@ray.remote(max_restarts=-1, num_cpus=0)
class Answering:
    """All that a controller is while it is being revived."""

    def __init__(self, broken: str) -> None:
        if os.path.exists(broken):
            raise ValueError("the ledger is damaged")

    async def ping(self) -> int:
        return os.getpid()

    async def begin(self, running: int) -> None:
        pass


def revived(client: ControllerClient, lost: ControllerLost) -> None:
    deadline = time.monotonic() + 60
    for _ in client.revive(lost, lambda: True, lambda: 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_controller_that_is_killed_or_stopped_is_revived_each_time(tmp_path: Path, kills: int) -> None:
    """With calls under way, as always. One that is stopped is killed by the driver: its calls end in other ways."""
    client = ControllerClient(Answering.remote(str(tmp_path / "broken")), patience=15.0, start=60.0)
    before = 0
    for number in range(kills):
        pulse = Pulse(lambda: client.send("ping").future(), 15.0)
        pid, stopped = client.ask("ping"), number % 3 == 2
        assert pid != before
        os.kill(pid, signal.SIGSTOP if stopped else signal.SIGKILL)
        before, deadline = pid, time.monotonic() + number % 5 * 0.05
        while time.monotonic() < deadline:
            pulse.hangs(0.01)
        revived(client, ControllerLost("as played", hung=stopped))
    ray.kill(client.actor)


def test_a_controller_whose_constructor_fails_is_not_waited_for(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    client = ControllerClient(Answering.remote(str(broken)), patience=15.0, start=60.0)
    pid = client.ask("ping")
    broken.touch()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="does not start again: ValueError: the ledger is damaged"):
        revived(client, ControllerLost("died"))


# ---- the store ----

SEGMENT_BYTES = 32 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[StoreSupervisor, MooncakeMaster, list[Any]]]:
    """A store, its master and its nodes, the newest last."""
    master, nodes = MooncakeMaster(tmp_path / "master.log"), list[Any]()

    def start_node() -> Any:
        nodes.append(ray.remote(max_concurrency=3, num_cpus=0)(StoreNode).remote(master.endpoint, SEGMENT_BYTES))
        return nodes[-1]

    supervisor = StoreSupervisor(master, start_node, SEGMENT_BYTES, RecoveryConfig(hang_seconds=5, start_seconds=60))
    ray.get(nodes[0].ping.remote())
    yield supervisor, master, nodes
    supervisor.close()
    master.stop()
    for node in nodes:
        ray.kill(node)


def watch(supervisor: StoreSupervisor, until: Callable[[], bool]) -> None:
    """As the driver does; every look is short."""
    deadline = time.monotonic() + 90
    while not until():
        assert time.monotonic() < deadline
        started = time.monotonic()
        supervisor.check(LOOK_SECONDS)
        assert time.monotonic() - started < LONGEST_LOOK_SECONDS
        time.sleep(LOOK_SECONDS)


def guarded(master: MooncakeMaster) -> tuple[psutil.Process, psutil.Process]:
    """The guard and the master's own process."""
    guard = psutil.Process(master._process.pid)
    (command,) = guard.children()
    return guard, command


def test_a_stopped_guard_and_a_dead_node_are_no_end_of_the_watch(store: Any) -> None:
    supervisor, master, nodes = store
    watch(supervisor, lambda: supervisor._master_pulse.answer is not None)
    guard, _ = guarded(master)
    guard.suspend()
    ray.kill(nodes[0])
    watch(supervisor, lambda: bool(supervisor.fault))
    assert supervisor.fault == "the store's node died"
    watch(supervisor, lambda: not supervisor.fault)
    assert master.usage().capacity_bytes == SEGMENT_BYTES and len(nodes) == 2 and not guard.is_running()


def test_a_master_that_dies_during_a_repair_is_started_again(store: Any) -> None:
    """The repair waits for a new node, which takes seconds to start."""
    supervisor, master, nodes = store
    ray.kill(nodes[0])
    watch(supervisor, lambda: len(nodes) == 2)
    _, command = guarded(master)
    command.kill()
    watch(supervisor, lambda: not supervisor.fault)
    assert master.usage().capacity_bytes == SEGMENT_BYTES


@pytest.mark.parametrize(
    ("part", "how", "fault", "nodes_then"),
    [
        ("guard", signal.SIGKILL, "the store's master died", 1),
        ("master", signal.SIGKILL, "the store's master died", 1),
        ("master", signal.SIGSTOP, "the store's master hangs", 1),
        ("node", signal.SIGKILL, "the store's node died", 2),
        ("node", signal.SIGSTOP, "the store's node hangs", 2),
    ],
)
def test_whatever_happens_to_a_part_of_the_store_it_comes_back(
    store: Any, part: str, how: signal.Signals, fault: str, nodes_then: int
) -> None:
    """A node that is left finds the new master by itself. Nobody wakes here what was stopped."""
    supervisor, master, nodes = store
    guard, command = guarded(master)
    (node,) = (p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::StoreNode"))
    watch(supervisor, lambda: supervisor._node_pulse.answer is not None)
    {"guard": guard, "master": command, "node": node}[part].send_signal(how)
    watch(supervisor, lambda: bool(supervisor.fault))
    assert supervisor.fault == fault
    watch(supervisor, lambda: not supervisor.fault)
    assert guarded(master)[1].pid != command.pid and len(nodes) == nodes_then
    assert master.usage().capacity_bytes == SEGMENT_BYTES


def test_a_store_that_stays_away_ends_the_run_in_one_line(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, master, _ = store
    monkeypatch.setattr(supervisor, "_capacity", lambda: 0)
    guarded(master)[1].kill()
    watch(supervisor, lambda: bool(supervisor.fault))
    supervisor._deadline = time.monotonic()
    with pytest.raises(RunFailed, match="the store's master died, and it has not come back in 60 s"):
        watch(supervisor, lambda: False)
