"""The reports that the controller keeps for the driver."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.reports import REPORT
from torchspec.monitor.record.observer import Observer


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
    observer.close()
