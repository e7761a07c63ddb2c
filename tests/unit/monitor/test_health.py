"""Whether a run is healthy, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.pipeline import Setup, Simulation
from torchspec.monitor.health import PROGRESS, RECENT_SECONDS, STALLED_SECONDS, assess, count_faults
from torchspec.monitor.record.recorder import EventLog
from torchspec.monitor.snapshot import Snapshot


@pytest.fixture
def snapshot() -> Snapshot:
    *_, newest = Simulation(Setup(workers=3, warm_up=1.0)).snapshots(30)
    return newest


def fault(kind: str, time: float, message: str = "worker-1 is gone") -> dict[str, Any]:
    return {"time": time, "kind": kind, "message": message}


def test_a_run_that_goes_well_is_healthy(snapshot: Snapshot) -> None:
    health = assess(snapshot, [fault("checkpoint", snapshot.time)], [], live=True, now=snapshot.time + 1)
    assert (health.level, health.headline) == ("good", "Healthy") and "3 workers, 2 ranks" in health.text


def test_losses_that_were_made_good_are_counted(snapshot: Snapshot) -> None:
    scarred = replace(snapshot, point=replace(snapshot.point, faults=2))
    old = fault("worker_lost", snapshot.time - RECENT_SECONDS - 1)
    health = assess(scarred, [old], [], live=True, now=snapshot.time)
    assert health.level == "good" and "2 recovered faults so far" in health.text


@pytest.mark.parametrize(
    ("kinds", "headline"),
    [
        (["worker_lost"], "1 worker lost"),
        (["worker_lost", "worker_lost"], "2 workers lost"),
        (["worker_lost", "trainer_lost"], "1 trainer lost"),
        (["store_lost", "store_back"], "Store lost"),
        (["controller_lost"], "Controller lost"),
    ],
)
def test_a_recent_loss_is_a_warning(snapshot: Snapshot, kinds: list[str], headline: str) -> None:
    events = [fault(kind, snapshot.time - 12) for kind in kinds]
    health = assess(snapshot, events, [], live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", headline)
    assert health.text == "12 s ago: worker-1 is gone"


def test_an_export_that_failed_is_told_while_the_run_goes_on_and_at_its_end(snapshot: Snapshot) -> None:
    failed = replace(snapshot, status=replace(snapshot.status, export_failure="the disk is full"))
    health = assess(failed, [], [], live=True, now=snapshot.time)
    assert (health.level, health.headline, health.text) == ("warning", "No export", "the disk is full")
    ended = replace(failed, status=replace(failed.status, phase="finished"))
    assert assess(ended, [], [], live=False, now=snapshot.time).headline == "Finished without an export"


def test_trouble_beside_the_training_is_a_warning_for_a_while(snapshot: Snapshot) -> None:
    trouble = fault("trouble", snapshot.time - 10, "cannot write x: No space left on device")
    health = assess(snapshot, [trouble], [], live=True, now=snapshot.time)
    assert (health.level, health.headline, health.text) == ("warning", "Trouble", trouble["message"])
    old = trouble | {"time": snapshot.time - RECENT_SECONDS - 1}
    assert assess(snapshot, [old], [], live=True, now=snapshot.time).level == "good"


def test_silence_is_noticed(snapshot: Snapshot) -> None:
    workers = (snapshot.workers[0], replace(snapshot.workers[1], doing="silent", heard=snapshot.time - 8))
    health = assess(replace(snapshot, workers=workers), [], [], live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", "1 worker silent")
    assert health.text == "worker-1: nothing heard for 8 s"
    late = assess(snapshot, [], [], live=True, now=snapshot.time + 60)
    assert (late.level, late.headline, late.text) == ("bad", "Controller silent", "not heard of for 60 s")
    later = assess(snapshot, [], [], live=True, now=snapshot.time + 3600)
    assert later.text == "not heard of for 60 min; if its machine is gone: torchspec resume"
    gone = replace(snapshot, workers=tuple(replace(w, doing="gone") for w in snapshot.workers))
    assert assess(gone, [], [], live=True, now=snapshot.time).headline == "No workers"


def test_a_run_in_which_nothing_happens_is_stalled(snapshot: Snapshot) -> None:
    point = {name: getattr(snapshot.point, name) for name in PROGRESS}
    quiet = [point | {"time": snapshot.time - ago} for ago in (STALLED_SECONDS + 1, STALLED_SECONDS - 1, 0)]
    health = assess(snapshot, [], quiet, live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("bad", "Stalled")
    for name in PROGRESS:
        earlier = quiet[0] | {name: quiet[0][name] - 1}
        assert assess(snapshot, [], [earlier, *quiet[1:]], live=True, now=snapshot.time).level == "good", name
    assert assess(snapshot, [], quiet[1:], live=True, now=snapshot.time).level == "good", "it has not been long"
    starting = replace(snapshot, workers=(replace(snapshot.workers[0], doing="starting"), *snapshot.workers[1:]))
    health = assess(starting, [], quiet, live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", "Nothing happens yet")
    for phase in ("counting-vocabulary", "stopping"):
        other = replace(snapshot, status=replace(snapshot.status, phase=phase), ranks=())
        assert assess(other, [], quiet, live=True, now=snapshot.time).headline == "Stalled", phase


def test_a_store_that_is_away_is_said_for_as_long_as_it_is(snapshot: Snapshot) -> None:
    """It used to be healthy again after three minutes."""
    for seconds, level in ((5.0, "warning"), (600.0, "bad")):
        lost = [fault("store_lost", snapshot.time - seconds)]
        health = assess(snapshot, lost, [], live=True, now=snapshot.time)
        assert (health.level, health.headline) == (level, "Store away")
    assert health.text == "10 min so far; nothing is captured until it is back"
    for kind in ("store_back", "controller_lost", "resumed"):
        back = [*lost, fault(kind, snapshot.time - 590)]
        assert assess(snapshot, back, [], live=True, now=snapshot.time).headline == "Healthy", kind


def test_a_group_that_starts_again_is_a_warning(snapshot: Snapshot) -> None:
    health = assess(replace(snapshot, ranks=()), [], [], live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", "No ranks")


def test_workers_that_were_not_needed_any_more_are_no_fault(snapshot: Snapshot) -> None:
    ended = replace(snapshot.workers[0], doing="ended", heard=0.0)
    health = assess(replace(snapshot, workers=(ended, *snapshot.workers[1:])), [], [], live=True, now=snapshot.time)
    assert health.level == "good" and "2 workers" in health.text


def test_faults_of_the_whole_run_are_counted(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for kind in ("resumed", "worker_lost", "controller_lost", "checkpoint", "worker_left"):
        log.write(0.0, kind, "")
    assert count_faults(tmp_path) == 2


@pytest.mark.parametrize(
    ("phase", "level", "headline"),
    [("finished", "good", "Finished"), ("stopped", "idle", "Stopped"), ("training", "bad", "Not running")],
)
def test_how_it_ended(snapshot: Snapshot, phase: str, level: str, headline: str) -> None:
    ended = replace(snapshot, status=replace(snapshot.status, phase=phase))
    health = assess(ended, [], [], live=False, now=snapshot.time + 9999)
    assert (health.level, health.headline) == (level, headline)


def test_the_reason_of_a_failure_is_said(snapshot: Snapshot) -> None:
    health = assess(
        snapshot, [fault("failed", snapshot.time, "out of memory")], [], live=False, now=snapshot.time + 9999
    )
    assert (health.level, health.headline, health.text) == ("bad", "Failed", "out of memory")


def test_a_failure_before_the_last_resume_is_none_of_now(snapshot: Snapshot) -> None:
    events = [fault("failed", snapshot.time - 60, "out of memory"), fault("resumed", snapshot.time - 50)]
    assert assess(snapshot, events, [], live=False, now=snapshot.time).headline == "Not running"


def test_no_data_is_no_fault() -> None:
    assert assess(None, [], [], live=True, now=0.0).level == assess(None, [], [], live=False, now=0.0).level == "idle"
