"""The reports that the controller keeps for the driver, and what Ray is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reports import REPORT
from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS
from torchspec.monitor.record import observer as observers
from torchspec.monitor.record.observer import Observer, RayMetrics
from torchspec.monitor.series import read_series
from torchspec.run_folder import RunFolder


def test_reports_that_the_driver_has_are_forgotten_and_their_numbers_stay(tmp_path: Path):
    observer, seen, count = Observer(tmp_path, 0), [], 0
    for step in range(1, 7):
        observer.report(replace(REPORT, step=step))
        if step % 2 == 0:
            news = observer.steps_since(count)
            assert len(news) == 2 == len(observer._steps)
            count += len(news)
            seen += [report.step for report in news]
    assert seen == [1, 2, 3, 4, 5, 6] and observer.steps_since(count) == observer._steps == []
    observer.report(replace(REPORT, step=7))
    for count in (0, 0):  # it has lost touch, and counts anew
        assert [report.step for report in observer.steps_since(count)] == [7]
    assert observer.steps_since(1) == []
    observer.report(replace(REPORT, step=7))
    assert observer.steps_since(1) == [], "said twice, because the first answer was lost"


def test_an_event_is_one_line_of_text_whatever_a_reason_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    observer = Observer(tmp_path, 0)
    with caplog.at_level("INFO"):
        observer.note("rejected x: \x1b[2J\nall is well", "rejected")
        asyncio.run(observer.close())
    escaped = "rejected x: \\x1b[2J\\nall is well"
    (event,) = read_series(RunFolder(tmp_path).events)
    assert observer.messages == [event["message"]] == [escaped] == caplog.messages


def test_ray_has_the_totals_and_the_drafts_curves_but_no_single_worker(monkeypatch: pytest.MonkeyPatch):
    told: dict[str, dict[tuple[str, ...], float]] = {}

    class Gauge:
        """Takes note, and like Ray's wants a value for each of its tags."""

        def __init__(self, name: str, _meaning: str, tag_keys: tuple[str, ...]):
            self._tags, self._values = tag_keys, told.setdefault(name, {})

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self._tags)
            self._values[tuple(tags[key] for key in self._tags)] = value

    monkeypatch.setattr(observers, "Gauge", Gauge)
    *_, snapshot = Simulation(SCENARIOS["balanced"]).snapshots(60)
    RayMetrics("mine").update(snapshot)
    assert told["torchspec_step"] == {("mine",): snapshot.status.step} and snapshot.status.step > 0
    assert told["torchspec_samples"]["mine", "pending"] == snapshot.point.samples["pending"]
    losses = enumerate(snapshot.status.last_step.loss_per_position, start=1)
    assert told["torchspec_position_loss"] == {("mine", "train", str(i)): loss for i, loss in losses}
    assert not any(name.startswith(("torchspec_worker_samples", "torchspec_rank_")) for name in told)
