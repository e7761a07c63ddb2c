"""From reports to snapshots, and into the run's folder and back."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import pytest

from tests.clock import Clock
from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS
from torchspec.contracts import RankReport, SampleId, SampleRef, SampleTiming, WorkerReport
from torchspec.data.masks import pack_mask, unpack_mask
from torchspec.instruments import EMPTY, FEWEST_STEPS, observe
from torchspec.monitor import snapshot as snapshots
from torchspec.monitor.record.recorder import EventLog, Recorder
from torchspec.monitor.record.telemetry import GONE_KEPT, Telemetry
from torchspec.monitor.record.timeline import TOKENS_KEPT, Timelines
from torchspec.monitor.series import read_series
from torchspec.run_folder import RunFolder

STATUS = Simulation(SCENARIOS["balanced"]).status()


@pytest.fixture
def telemetry(clock: Clock) -> Telemetry:
    return Telemetry(clock)


def test_rates_and_latencies_are_those_of_the_last_half_minute(telemetry: Telemetry, clock: Clock) -> None:
    slow, fast = observe(EMPTY, 8.0), observe(observe(EMPTY, 8.0), 0.015)
    telemetry.worker_report(WorkerReport("w0", samples=100, seconds=500, put_histogram=slow))
    clock.now += 100
    for i in range(1, 61):
        clock.now += 1
        telemetry.worker_report(
            WorkerReport(
                "w0",
                samples=100 + 2 * i,
                tokens=200 * i,
                put_bytes=1000 * i,
                put_seconds=0.1 * i,
                seconds=600 + i,
                busy_seconds=0.75 * i,
                put_histogram=fast,
                leases=1,
            )
        )
    (worker,) = telemetry.snapshot(STATUS).workers
    assert (worker.samples_per_s, worker.tokens_per_s) == (pytest.approx(2), pytest.approx(200))
    assert worker.put_bytes_per_s == pytest.approx(10_000) and worker.wait_share == pytest.approx(0.25)
    assert worker.put_p50_seconds is None, "no put in the last half minute"
    clock.now += 1
    telemetry.worker_report(replace(worker.report, seconds=661, put_histogram=observe(fast, 0.015)))
    (worker,) = telemetry.snapshot(STATUS).workers
    assert worker.put_p99_seconds is not None and 0.01 < worker.put_p99_seconds <= 0.02, "the slow one was long ago"


def test_ranks_with_long_steps_are_judged_by_several_of_them(telemetry: Telemetry, clock: Clock) -> None:
    for second in range(1000):
        steps = second // 60
        counts = {"steps": steps, "tokens": 6000 * steps, "backward_seconds": 45.0 * steps}
        telemetry.rank_report(RankReport(0, seconds=second, **counts))
        clock.now += 1
        if steps >= 5:
            (rank,) = telemetry.snapshot(STATUS).ranks
            off = 1 / (FEWEST_STEPS - 1)  # counters grow once a step, wherever the stretch begins in one
            assert rank.tokens_per_s == pytest.approx(100, rel=off)
            assert rank.backward_share == pytest.approx(0.75, rel=off)
    (rank,) = telemetry.snapshot(STATUS).ranks
    assert rank.step_seconds == pytest.approx(60, rel=0.25)


def test_ranks_with_short_steps_are_judged_by_the_last_half_minute(telemetry: Telemetry, clock: Clock) -> None:
    for second in range(200):
        telemetry.rank_report(RankReport(0, seconds=second, steps=2 * second, tokens=max(0, second - 100) * 70))
        clock.now += 1
    (rank,) = telemetry.snapshot(STATUS).ranks
    assert rank.tokens_per_s == pytest.approx(70) and rank.step_seconds == pytest.approx(0.5)


def test_totals_go_on_when_workers_and_ranks_are_replaced(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.worker_started("w0")
    telemetry.worker_report(WorkerReport("w0", put_bytes=10, seconds=5))
    telemetry.worker_report(WorkerReport("w0", put_bytes=30, seconds=6))
    telemetry.worker_gone("w0", "gone")
    telemetry.worker_report(WorkerReport("older", put_bytes=10**9, seconds=10**6))  # than this controller
    telemetry.worker_gone("older", "gone")
    telemetry.worker_started("w1")
    telemetry.worker_report(WorkerReport("w1", put_bytes=7, seconds=1))
    telemetry.rank_report(RankReport(0, wait_seconds=4.0, seconds=9))
    clock.now += 60
    telemetry.rank_report(RankReport(0, wait_seconds=1.0, seconds=2))
    telemetry.rank_report(RankReport(0, wait_seconds=1.5, seconds=3))
    snapshot = telemetry.snapshot(STATUS)
    assert snapshot.point.put_bytes == 37 and snapshot.point.worker_seconds == 7
    assert snapshot.point.rank_wait_seconds == 5.5 and snapshot.point.rank_seconds == 12
    assert (snapshot.point.workers, snapshot.point.ranks) == (1, 1)
    assert snapshot.ranks[0].wait_share == pytest.approx(0.5), "of the new rank alone"


def test_what_a_worker_is_doing(telemetry: Telemetry, clock: Clock) -> None:
    def doing() -> dict[str, str]:
        return {w.name: w.doing for w in telemetry.snapshot(STATUS).workers}

    for i in (2, 10, 9):
        telemetry.worker_started(f"worker-{i}")
    assert list(doing()) == ["worker-2", "worker-9", "worker-10"]
    clock.now += 60
    assert set(doing().values()) == {"starting"}, "an engine warms up for long"
    assert telemetry.worker_report(WorkerReport("worker-2", leases=3)), "its first"
    assert not telemetry.worker_report(WorkerReport("worker-2", leases=3))
    telemetry.worker_report(WorkerReport("worker-9"))
    telemetry.worker_gone("worker-10", "ended")
    assert doing() == {"worker-2": "working", "worker-9": "waiting", "worker-10": "ended"}
    clock.now += 4
    telemetry.worker_report(WorkerReport("worker-9"))
    clock.now += 2
    assert doing() == {"worker-2": "silent", "worker-9": "waiting", "worker-10": "ended"}
    for i in range(100, 200):
        telemetry.worker_started(f"worker-{i}")
        telemetry.worker_gone(f"worker-{i}", "gone")
    assert list(doing().values()).count("gone") == GONE_KEPT and "worker-199" in doing()


def test_what_stands_in_the_way_is_timed(telemetry: Telemetry, clock: Clock) -> None:
    for blocked in (True, True, False, True):
        telemetry.credit_blocked.set(blocked)
        clock.now += 10
    assert telemetry.snapshot(STATUS).point.credit_blocked_seconds == 30
    assert telemetry.snapshot(STATUS).point.window_blocked_seconds == 0


def test_a_snapshot_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    simulation = Simulation(SCENARIOS["balanced"])
    *_, snapshot = simulation.snapshots(60)
    simulation.kill(0)
    *_, snapshot = simulation.snapshots(1)
    reports = tuple(w.report for w in snapshot.workers if w.doing != "gone")
    snapshot = replace(snapshot, status=replace(snapshot.status, workers=reports))
    assert len(reports) == 3 and len(snapshot.workers) == 4
    assert snapshots.read_latest(tmp_path) is None
    Recorder(tmp_path).write(snapshot)
    assert snapshots.read_latest(tmp_path) == snapshot
    newer = RunFolder(tmp_path).latest
    newer.write_text(newer.read_text().replace('"schema":1', '"schema":2'))
    with pytest.raises(ValueError, match="schema 2"):
        snapshots.read_latest(tmp_path)


def test_the_recorder_writes_totals_each_time_and_entities_now_and_then(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    written = list(Simulation(SCENARIOS["balanced"]).snapshots(60))
    for snapshot in written:
        recorder.write(snapshot)
    folder = RunFolder(tmp_path)
    history = read_series(folder.history)
    kind = snapshots.adapter(snapshots.HistoryPoint)
    assert [kind.validate_python(record) for record in history] == [snapshot.point for snapshot in written]
    entities = read_series(folder.entities)
    assert len(entities) == 6 and set(entities[-1]["workers"]) == {f"worker-{i}" for i in range(4)}
    again = Recorder(tmp_path)
    again.write(replace(written[-1], point=replace(written[-1].point, time=written[-1].time + 1)))
    assert len(read_series(folder.history)) == 61, "a restarted controller goes on"


def test_events_keep_their_details(tmp_path: Path) -> None:
    EventLog(tmp_path).write(5.0, "worker_lost", "w0 is gone", worker="w0", leases=3)
    (event,) = read_series(RunFolder(tmp_path).events)
    assert event == {
        "time": 5.0,
        "kind": "worker_lost",
        "message": "w0 is gone",
        "detail": {"worker": "w0", "leases": 3},
    }


def ref(sample: SampleId) -> SampleRef:
    return SampleRef(sample, "key", 3, pack_mask([0, 1, 1]), {}, 99, "post_norm")


def test_a_timeline_is_followed_through_a_failure_to_its_end(tmp_path: Path, clock: Clock) -> None:
    timelines = Timelines(tmp_path, 1.0, clock)
    sample, other = SampleId(0, 4), SampleId(0, 5)
    timelines.moved(sample, "pending", "leased", "w0")
    timelines.moved(other, "pending", "leased", "w0")
    assert timelines.follows(sample) and not timelines.follows(other), "one a second"
    clock.now += 3
    for gone in (sample, other):
        timelines.moved(gone, "leased", "pending", "w0 died")
    timelines.moved(sample, "pending", "leased", "w1")
    clock.now += 5
    timelines.published(sample, SampleTiming(queue_seconds=1, compute_seconds=2, hold_seconds=0.5, put_seconds=0.25))
    timelines.moved(sample, "leased", "stored", "")
    timelines.moved(sample, "stored", "assigned", "step 2")
    timelines.mark([sample, other], "fetched")
    timelines.moved(sample, "assigned", "trained", "")
    clock.now += 1
    timelines.finish(ref(sample), "chat-4", 2, b"\1\0\0\0" * 3, 1)
    (record,) = read_series(RunFolder(tmp_path).samples)
    assert (record["sample"], record["id"], record["worker"], record["step"]) == ("e0p4", "chat-4", "w1", 2)
    assert (record["attempts"], record["tokens"], record["prompt_tokens"], record["num_bytes"]) == (2, 3, 1, 99)
    assert [(moment, at) for moment, at, _ in record["timeline"]] == [
        ("leased", 0),
        ("failed", 3),
        ("leased", 3),
        ("computing", 5.25),
        ("computed", 7.25),
        ("putting", 7.75),
        ("stored", 8),
        ("assigned", 8),
        ("fetched", 8),
        ("trained", 8),
        ("freed", 9),
    ]
    assert not timelines.follows(sample)


def test_what_goes_back_is_marked_with_the_reason_and_what_is_rejected_is_forgotten(
    tmp_path: Path, clock: Clock
) -> None:
    timelines, sample = Timelines(tmp_path, 1.0, clock), SampleId(0, 4)
    timelines.moved(sample, "pending", "leased", "w0")
    timelines.moved(sample, "leased", "pending", "")  # nobody's fault
    timelines.moved(sample, "pending", "leased", "w1")
    timelines.moved(sample, "leased", "assigned", "")  # to its step
    timelines.moved(sample, "assigned", "pending", "not in the store")
    timelines.finish(ref(sample), "chat-4", 2, b"\1\0\0\0" * 3, 1)
    (record,) = read_series(RunFolder(tmp_path).samples)
    moments = [(moment, detail) for moment, _, detail in record["timeline"]]
    assert moments == [("leased", "w0"), ("leased", "w1"), ("lost", "not in the store"), ("freed", "")]
    clock.now += 1
    timelines.moved(sample, "pending", "leased", "w0")
    timelines.moved(sample, "leased", "rejected", "bad")
    assert not timelines.follows(sample)


def test_held_out_samples_and_samples_of_an_unmonitored_run_are_not_followed(tmp_path: Path, clock: Clock) -> None:
    timelines = Timelines(tmp_path, 1.0, clock)
    timelines.moved(SampleId(-1, 0), "pending", "leased", "w0")
    assert not timelines.follows(SampleId(-1, 0))
    off = Timelines(tmp_path, 0, clock)
    off.moved(SampleId(0, 0), "pending", "leased", "w0")
    assert not off.follows(SampleId(0, 0))


def test_of_a_long_sample_only_the_beginning_is_kept(tmp_path: Path, clock: Clock) -> None:
    timelines, sample, long = Timelines(tmp_path, 1000.0, clock), SampleId(0, 4), TOKENS_KEPT + 100
    timelines.moved(sample, "pending", "leased", "w0")
    mask = pack_mask([True] * long)
    whole = SampleRef(sample, "key", long, mask, {}, 100, "post_norm")
    timelines.finish(whole, "chat-4", 2, b"\1\0\0\0" * long, None)
    (record,) = read_series(RunFolder(tmp_path).samples)
    assert record["tokens"] == long and len(b64decode(record["token_ids"])) == 4 * TOKENS_KEPT
    assert all(unpack_mask(b64decode(record["loss_mask"]), TOKENS_KEPT))
