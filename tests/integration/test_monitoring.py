"""What the real controller writes down about itself while workers fail, samples are lost and ranks train."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.integration.controller_harness import drive, make, member, start
from torchspec.contracts import RankReport, WorkerReport
from torchspec.controller.controller import Controller
from torchspec.monitor.bottleneck import judge_run
from torchspec.monitor.series import read_series
from torchspec.monitor.snapshot import Snapshot, read_latest
from torchspec.run_folder import RunFolder
from torchspec.store.hidden_state_store import HiddenStateStore

PROMPTS, EPOCHS = 10, 2


async def monitored(controller: Controller, client: HiddenStateStore) -> None:
    """A run with two workers that fail now and then and report as real ones do; a third dies with its leases."""
    await start(controller)
    for name in ("w0", "w1", "dying"):
        await controller.worker_started(name)
    leases = await controller.lease("dying", 2, WorkerReport("dying"))
    await controller.worker_report(WorkerReport("dying", seconds=1.0, busy_seconds=1.0, leases=2))
    await asyncio.sleep(0.15)
    assert len(leases) == 2 and await controller.worker_lost("dying", True) == 2
    await controller.worker_report(WorkerReport("dying", seconds=2.0))  # its last words come late
    for number in range(2):
        await controller.worker_report(WorkerReport(f"w{number}", seconds=3.0, busy_seconds=2.0, put_bytes=5))
        await controller.rank_report(member(number), RankReport(number, seconds=4.0, wait_seconds=1.0, get_bytes=7))
    await drive(controller, client, workers=2, ranks=1, seed=2)


@pytest.fixture(scope="module")
def run(endpoint, tmp_path_factory) -> tuple[Path, Controller]:
    folder = tmp_path_factory.mktemp("monitored") / "run"
    client = HiddenStateStore(endpoint, 8 << 20)
    controller = make(endpoint, folder, prompts=PROMPTS, monitor={"history_seconds": 0.1})
    controller.observer.timelines._spacing = 0.0  # follow every sample
    asyncio.run(monitored(controller, client))
    client.close()
    return folder, controller


@pytest.fixture(scope="module")
def latest(run) -> Snapshot:
    snapshot = read_latest(run[0])
    assert snapshot is not None
    return snapshot


def test_the_last_snapshot_is_the_runs_end(run, latest) -> None:
    _, controller = run
    assert latest.point.phase == "finished" and latest.status.step == controller.buffer.ledger.trained_step == 5
    assert latest.status.samples == dict(controller.buffer.ledger.counts())
    assert latest.point.credit_bytes == latest.point.store_bytes == latest.point.queue_depth == 0
    assert latest.point.captured_samples == latest.point.trained_samples == PROMPTS * EPOCHS
    assert latest.point.worker_losses == 1 and latest.point.retries > 0
    assert (latest.point.put_bytes, latest.point.get_bytes) == (10, 14)
    assert (latest.point.worker_seconds, latest.point.rank_wait_seconds) == (7.0, 2.0)
    doing = {w.name: w.doing for w in latest.workers}
    assert doing["dying"] == "gone" and doing["w0"] in ("waiting", "silent") and latest.point.faults == 1
    assert [rank.rank for rank in latest.ranks] == [0, 1], "who trained it is still to be seen"


def test_history_goes_only_forward(run) -> None:
    folder, _ = run
    history = read_series(RunFolder(folder).history)
    assert len(history) >= 3
    for name in ("time", "step", "captured_samples", "trained_tokens", "worker_seconds", "retries"):
        assert all(b[name] >= a[name] for a, b in pairwise(history)), name
    assert all(sum(point["samples"].values()) == PROMPTS * EPOCHS for point in history)
    assert judge_run(folder, live=False).state == "ended"


def test_events_tell_the_story_in_order(run) -> None:
    folder, _ = run
    events = read_series(RunFolder(folder).events)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "trainer_started" and kinds[1:4] == ["worker_started"] * 3 and kinds[-1] == "finished"
    lost = events[kinds.index("worker_lost")]
    assert lost["detail"] == {"worker": "dying", "leases": 2} and "2 of its leases" in lost["message"]
    assert kinds.index("worker_ready") < kinds.index("worker_lost")
    failed = [event for event in events if event["kind"] == "sample_failed"]
    assert failed and all("unlucky" in event["message"] for event in failed)
    assert {event["detail"]["step"] for event in events if event["kind"] == "checkpoint"} == {2, 4, 5}


def test_every_sample_can_be_followed_from_lease_to_end(run) -> None:
    folder, controller = run
    samples = read_series(RunFolder(folder).samples)
    assert sorted(s["sample"] for s in samples) == sorted(f"e{e}p{p}" for e in range(EPOCHS) for p in range(PROMPTS))
    answers = {a["id"]: a["token_ids"] for a in map(json.loads, (folder / "answers.jsonl").read_text().splitlines())}
    order = ["leased", "stored", "assigned", "fetched", "trained", "freed"]
    for sample in samples:
        moments = [moment for moment, _, _ in sample["timeline"]]
        times = [time for _, time, _ in sample["timeline"]]
        assert times == sorted(times)
        assert [m for m in moments if m != "failed"][moments.count("failed") :] == order
        assert sample["attempts"] == 1 + moments.count("failed") == moments.count("leased")
        ids = np.frombuffer(b64decode(sample["token_ids"]), "<i4").tolist()
        assert sample["prompt_tokens"] == 3 and len(ids) == sample["tokens"] == 6
        assert ids[3:] == answers[sample["id"].split()[0]][:-1]
        step = controller.buffer.ledger.shape.batch_size
        assert sample["step"] in range(1, 1 + -(-PROMPTS * EPOCHS // step))
    assert sum(s["attempts"] > 1 for s in samples) > 0
    died = [s for s in samples if "dying died" in [detail for _, _, detail in s["timeline"]]]
    assert len(died) == 2 and all(s["worker"] in ("w0", "w1") for s in died)


def test_what_holds_up_leases_is_timed(endpoint, tmp_path) -> None:
    async def scenario(blocked_by: str, **overrides) -> Snapshot:
        controller = make(endpoint, tmp_path / blocked_by, monitor={"history_seconds": 2}, **overrides)
        await start(controller)
        await controller.lease("w0", 100, WorkerReport("w0"))
        waiting = asyncio.create_task(controller.lease("w0", 100, WorkerReport("w0")))
        await asyncio.sleep(0.3)
        await controller.observer.record(await controller.status())
        await controller.finish()
        assert await waiting == []
        snapshot = json.loads((RunFolder(tmp_path / blocked_by).history).read_text().splitlines()[-2])
        return snapshot

    by_credits = asyncio.run(scenario("credits", credit_bytes=60_000))
    assert by_credits["credit_blocked_seconds"] >= 0.3 and by_credits["window_blocked_seconds"] == 0
    by_window = asyncio.run(scenario("window"))
    assert by_window["window_blocked_seconds"] >= 0.3 and by_window["credit_blocked_seconds"] == 0


def test_switched_off_it_writes_no_snapshot(endpoint, tmp_path) -> None:
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, monitor={"history_seconds": 0})
        await start(controller)
        await controller.lease("w0", 1, WorkerReport("w0"))
        await controller.finish()

    asyncio.run(scenario())
    assert read_latest(tmp_path) is None and read_series(RunFolder(tmp_path).history) == []


def test_what_dies_is_written_down_at_once(endpoint, tmp_path) -> None:
    """Also what dies while a snapshot is being written."""

    def gone() -> set[str]:
        latest = read_latest(tmp_path)
        return {worker.name for worker in latest.workers if not worker.alive} if latest else set()

    async def scenario() -> None:
        controller = make(endpoint, tmp_path, monitor={"history_seconds": 2})
        observer, write = controller.observer, controller.observer._write
        observer.interval = 3600.0

        def slow_write(snapshot: Snapshot) -> None:
            time.sleep(0.3)
            write(snapshot)

        observer._write = slow_write
        await start(controller)
        for name in ("w0", "w1"):
            await controller.lease(name, 1, WorkerReport(name))
            await controller.worker_report(WorkerReport(name))
        await asyncio.sleep(0.5)
        await controller.worker_lost("w0", True)
        await asyncio.sleep(0.1)
        await controller.worker_lost("w1", True)
        async with asyncio.timeout(60):
            while gone() != {"w0", "w1"}:
                await asyncio.sleep(0.05)
        await controller.finish()

    asyncio.run(scenario())
