"""A run across two hosts: SGLang on one, the trainer, the store and the driver on the other."""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.hosts import Host, ray_on, two_hosts
from tests.online import (
    Command,
    journal,
    processes_of,
    seeded_batches,
    sorted_batches,
    wait_until_gone,
    wait_until_swept,
    write_config,
)
from torchspec.controller.verify import verify_run

ROLES = ("cluster.inference_resource=torchspec_inference", "cluster.training_resource=torchspec_training")
TOKEN = secrets.token_hex(32)
RAYS_OWN = ("/site-packages/ray/", "ray.util.client.server", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""In command lines of processes that only Ray has."""


@pytest.fixture(scope="module")
def hosts():
    with tempfile.TemporaryDirectory(prefix="ts") as folder, two_hosts() as (head, worker):
        temp_dir = Path(folder)
        with (
            ray_on(head, temp_dir, "head", f"--temp-dir={folder}/ray", roles="training", token=TOKEN),
            ray_on(
                *(worker, temp_dir, "worker", f"{head.address}:6379", f"--temp-dir={folder}/ray"),
                **{"roles": "inference", "token": TOKEN},
            ),
        ):
            yield head, worker


class HostCommand(Command):
    """A ``torchspec`` command on a host."""

    def __init__(self, host: Host, folder: Path, *arguments: str):
        os.environ["RAY_AUTH_TOKEN"] = TOKEN
        try:
            super().__init__(folder, *arguments, prefix=host.command())
        finally:
            del os.environ["RAY_AUTH_TOKEN"]


def host_of(process: psutil.Process) -> int:
    """The inode of its network namespace."""
    return os.stat(f"/proc/{process.pid}/ns/net").st_ino


def train(head: Host, folder: Path, target: Path) -> HostCommand:
    config = write_config(folder, target)
    where = ("--or-resume", "--address", f"{head.address}:6379", "cluster.nodes=2", *ROLES)
    return HostCommand(head, folder, "train", config, *where)


@contextmanager
def under_way(head: Host, folder: Path, target: Path) -> Iterator[HostCommand]:
    """A run that has made four steps; it does not outlive the context."""
    command = train(head, folder, target)
    try:
        command.wait_for(lambda: len(journal(folder / "run")) >= 4, "step 4")
        yield command
    finally:
        command.process.kill()


def test_a_run_across_hosts_keeps_to_its_network_and_outlives_a_cable_that_is_pulled(hosts, tmp_path, target_path):
    head, worker = hosts
    started, run_dir = time.time(), tmp_path / "run"
    received = head.received_bytes()
    with under_way(head, tmp_path, target_path) as command:
        check_places(run_dir, head, worker)
        check_sockets(head, worker)
        worker.unplug(seconds=5)
        assert command.wait() == 0, command.text
    check_end(run_dir, started, resumes=0)
    assert head.received_bytes() - received > put_bytes(run_dir), "the states have not come over the cable"


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_longer_than_rays_patience_comes_back(hosts, tmp_path, target_path):
    """Ray takes the node for dead; its launcher joins again, and another engine starts there."""
    head, worker = hosts
    started, run_dir = time.time(), tmp_path / "run"
    with under_way(head, tmp_path, target_path) as command:
        worker.unplug(seconds=90)
        assert command.wait() == 0, command.text
    assert "worker-0 died" in command.text and "worker-1" in command.text, command.text
    check_end(run_dir, started, resumes=0)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_nothing_on_any_host_and_a_run_to_resume(hosts, tmp_path, target_path):
    head, _ = hosts
    started, run_dir = time.time(), tmp_path / "run"
    with under_way(head, tmp_path, target_path) as first:
        psutil.Process(first.process.pid).send_signal(signal.SIGKILL)
        first.process.wait()
        wait_until_gone(run_dir)
    wait_until_swept(started)
    second = train(head, tmp_path, target_path)
    assert second.wait() == 0, second.text
    check_end(run_dir, started, resumes=1)


def check_end(run_dir: Path, started: float, resumes: int) -> None:
    verdict = verify_run(run_dir)
    assert verdict.violations == () and verdict.finished and verdict.resumes == resumes
    assert sorted_batches(journal(run_dir)) == sorted_batches(seeded_batches())
    wait_until_gone(run_dir)
    wait_until_swept(started)


def check_places(run_dir: Path, head: Host, worker: Host) -> None:
    namespaces = {host.name: int(host.run("stat", "-L", "-c", "%i", "/proc/self/ns/net")) for host in (head, worker)}
    for name, host in (("ray::Trainer", head), ("ray::Controller", head), ("mooncake_master", head)):
        assert {host_of(p) for p in processes_of(run_dir, name)} == {namespaces[host.name]}, name
    for name in ("ray::InferenceWorker", "sglang::scheduler"):
        assert {host_of(p) for p in processes_of(run_dir, name)} == {namespaces[worker.name]}, name


def check_sockets(head: Host, worker: Host) -> None:
    """Nothing of ours answers in the other network. Ray does, once in each process that has joined it."""
    for host, other in ((head, worker), (worker, head)):
        answering, names = Counter[int](), {}
        for address, port, pid, command in host.listeners():
            names[pid] = command
            assert address.is_loopback or address.is_unspecified or str(address) == host.address, (address, command)
            if address.is_unspecified and not any(name in command for name in RAYS_OWN):
                answering[pid] += other.reaches(host.other_address, port)
        allowed = {pid: name.startswith("ray::") or "torchspec" in name for pid, name in names.items()}
        assert {names[pid]: count for pid, count in answering.items() if count > allowed[pid]} == {}


def put_bytes(run_dir: Path) -> int:
    """What the engines have stored for the steps that were trained: states of four layers, float32."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(record["tokens"] for record in records if record["split"] == "train")
    return tokens * 4 * 576 * 4
