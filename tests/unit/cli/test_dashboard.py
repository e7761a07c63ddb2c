"""The dashboard at every size and every stage."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tests.unit.cli.commands import rendered
from tests.unit.cli.statuses import ACCURACY, COUNTING, STARTING, TRAINING
from torchspec.cli.dashboard import Dashboard, sparkline
from torchspec.contracts import RunStatus


def lines_of(dashboard: Dashboard, width: int) -> list[str]:
    return rendered(dashboard, width).splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_dashboard_shows_every_figure_at_any_width(width: int) -> None:
    lines = lines_of(Dashboard(TRAINING, ("checkpoint saved",), [5.0, 4.0, 3.0] * 9), width)
    assert {len(line) for line in lines} == {width}
    text = " ".join(lines)
    for figure in ("smollm2", "step 620/1,000", "epoch 2/3", "7m12s left", "training · 22m04s"):
        assert figure in text
    for figure in ("3.412", "3.777", "2.01", "1.91", "1.83e-03", "0.412", *(f"{a:.2f}" for a in ACCURACY)):
        assert figure in text, "the draft's"
    for figure in ("8.12", "3,912", "3.97", "1,204", "38", "412 MiB", "610 MiB", "920 MiB", "2.31 s", "86%", "0.125 s"):
        assert figure in text, "the pools'"
    for figure in ("committed 4,800", "trained 160", "stored 41", "leased 32", "pending 2,480", "rejected 3"):
        assert figure in text, "the ledger's"
    for figure in ("worker-0", "worker-1", "2,411", "61%", "checkpoint saved"):
        assert figure in text
    assert "…" not in text


def test_bars_are_as_long_as_their_values() -> None:
    def filled(status: RunStatus) -> int:
        return lines_of(Dashboard(status), 100)[1].count("━")

    assert filled(replace(TRAINING, step=0)) == 0
    quarter, half, full = (filled(replace(TRAINING, step=s)) for s in (250, 500, 1000))
    assert quarter > 5 and abs(half - 2 * quarter) <= 2 and abs(full - 2 * half) <= 2


def test_the_ledger_bar_fills_the_line_and_follows_the_counts() -> None:
    console = Console(width=104, record=True, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(Dashboard(replace(TRAINING, samples={"committed": 75, "pending": 25})))
    bar = next(line for line in console.export_text(styles=True).splitlines() if "━" * 75 in line)
    assert f"\x1b[32m{'━' * 75}\x1b[0m" in bar and f"\x1b[90m{'━' * 25}\x1b[0m" in bar


def test_a_pool_that_changes_says_so() -> None:
    changing = "\n".join(lines_of(Dashboard(replace(TRAINING, workers_wanted=5)), 100))
    settled = "\n".join(lines_of(Dashboard(replace(TRAINING, workers_wanted=2)), 100))
    assert "worker (2 of 5)" in changing and " of 2)" not in settled


@pytest.mark.parametrize(
    "status", [STARTING, COUNTING, replace(TRAINING, last_heldout=None), replace(TRAINING, last_step=None)]
)
@pytest.mark.parametrize("width", [50, 80, 160])
def test_it_can_be_drawn_at_every_stage(status: RunStatus, width: int) -> None:
    lines = lines_of(Dashboard(status), width)
    assert {len(line) for line in lines} == {width}
    assert status.phase.replace("-", " ") in lines[-1]


def test_the_starting_dashboard_says_what_it_waits_for() -> None:
    assert "counting vocabulary" in lines_of(Dashboard(STARTING), 80)[-1]


@pytest.mark.parametrize("max_lines", [22, 26, 30, 50])
def test_workers_and_events_are_cut_to_the_terminals_height(max_lines: int) -> None:
    workers = tuple(replace(TRAINING.workers[0], worker=f"worker-{i}") for i in range(20))
    events = [f"event {i}" for i in range(20)]
    lines = lines_of(Dashboard(replace(TRAINING, workers=workers), events, max_lines=max_lines), 100)
    assert len(lines) <= max_lines
    assert "event 19" in lines[-2], "the latest event stays"
    shown = sum("│ worker-" in line for line in lines)
    hidden = [line for line in lines if line.startswith("│ and ")]
    assert shown in (0, 20) or f"and {20 - shown} more" in hidden[0]
    assert shown == {22: 0, 26: 0, 30: 4, 50: 20}[max_lines]


def test_a_message_with_brackets_is_shown_as_it_is() -> None:
    assert any("tensor[3] [bold]x" in line for line in lines_of(Dashboard(TRAINING, ["tensor[3] [bold]x"]), 80))


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0] * 4 + [0.0] * 4 + [7.0] * 4, 6) == "██▁▁██"
    assert sparkline([1.0, 2.0], 20) == ""
    assert sparkline([2.0] * 10, 10) == "▁" * 10
