"""Whether a run is healthy, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.simulation.pipeline import Setup, Simulation
from torchspec.monitor.health import RECENT_SECONDS, assess
from torchspec.monitor.snapshot import Snapshot


@pytest.fixture
def snapshot() -> Snapshot:
    *_, newest = Simulation(Setup(workers=3, warm_up=1.0)).snapshots(30)
    return newest


def fault(kind: str, time: float, message: str = "worker-1 is gone") -> dict[str, Any]:
    return {"time": time, "kind": kind, "message": message}


def test_a_run_that_goes_well_is_healthy(snapshot: Snapshot) -> None:
    health = assess(snapshot, [fault("checkpoint", snapshot.time)], live=True, now=snapshot.time + 1)
    assert (health.level, health.headline) == ("good", "Healthy") and "3 workers, 2 ranks" in health.text


def test_losses_that_were_made_good_are_counted(snapshot: Snapshot) -> None:
    scarred = replace(snapshot, point=replace(snapshot.point, worker_losses=2))
    old = fault("worker_lost", snapshot.time - RECENT_SECONDS - 1)
    health = assess(scarred, [old], live=True, now=snapshot.time)
    assert health.level == "good" and "2 recovered faults so far" in health.text


@pytest.mark.parametrize(
    ("kinds", "headline"),
    [
        (["worker_lost"], "1 worker lost"),
        (["worker_lost", "worker_lost"], "2 workers lost"),
        (["worker_lost", "trainer_lost"], "1 trainer lost"),
        (["store_lost"], "Store lost"),
        (["controller_lost"], "Controller lost"),
    ],
)
def test_a_recent_loss_is_a_warning(snapshot: Snapshot, kinds: list[str], headline: str) -> None:
    events = [fault(kind, snapshot.time - 12) for kind in kinds]
    health = assess(snapshot, events, live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", headline)
    assert health.text == "12 s ago: worker-1 is gone"


def test_silence_is_noticed(snapshot: Snapshot) -> None:
    workers = (snapshot.workers[0], replace(snapshot.workers[1], doing="silent", heard=snapshot.time - 8))
    health = assess(replace(snapshot, workers=workers), [], live=True, now=snapshot.time)
    assert (health.level, health.headline) == ("warning", "1 worker silent")
    assert health.text == "worker-1: nothing heard for 8 s"
    late = assess(snapshot, [], live=True, now=snapshot.time + 60)
    assert (late.level, late.headline, late.text) == ("bad", "Controller silent", "not heard of for 60 s")
    gone = replace(snapshot, workers=tuple(replace(w, doing="gone") for w in snapshot.workers))
    assert assess(gone, [], live=True, now=snapshot.time).headline == "No workers"


@pytest.mark.parametrize(
    ("phase", "level", "headline"),
    [("finished", "good", "Finished"), ("stopped", "idle", "Stopped"), ("training", "bad", "Not running")],
)
def test_how_it_ended(snapshot: Snapshot, phase: str, level: str, headline: str) -> None:
    ended = replace(snapshot, status=replace(snapshot.status, phase=phase))
    health = assess(ended, [], live=False, now=snapshot.time + 9999)
    assert (health.level, health.headline) == (level, headline)


def test_the_reason_of_a_failure_is_said(snapshot: Snapshot) -> None:
    health = assess(snapshot, [fault("failed", snapshot.time, "out of memory")], live=False, now=snapshot.time + 9999)
    assert (health.level, health.headline, health.text) == ("bad", "Failed", "out of memory")


def test_no_data_is_no_fault() -> None:
    assert assess(None, [], live=True, now=0.0).level == assess(None, [], live=False, now=0.0).level == "idle"
