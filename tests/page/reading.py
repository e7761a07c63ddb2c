"""What a person reads on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec.cli.units import human_bytes, human_count, human_rate
from torchspec.monitor.snapshot import Snapshot, read_latest


def station(page: Any, name: str) -> str:
    return page.locator(f".station-{name}").text_content()


def tile(page: Any, label: str) -> str:
    return page.locator(".tile", has=page.get_by_role("heading", name=label, exact=True)).inner_text()


def rows(page: Any, tab: str) -> list[list[str]]:
    page.click(f"#tab-{tab}")
    table = page.locator(f"#panel-{tab} tbody")
    table.locator("tr").first.wait_for()
    return table.evaluate("body => [...body.rows].map(row => [...row.cells].map(cell => cell.textContent))")


def caught_up(page: Any, run_dir: Path) -> Snapshot:
    """What the run last said of itself, once the page has it too; nothing may move meanwhile."""
    for _ in range(2):
        with page.expect_response("**/api/update*"):
            pass
    page.wait_for_timeout(300)
    latest = read_latest(run_dir)
    assert latest is not None
    return latest


def check_figures(page: Any, latest: Snapshot) -> None:
    """The page shows the figures of this snapshot."""
    status, point = latest.status, latest.point
    speed = tile(page, "Speed")
    assert human_rate(status.training_samples_per_s) in speed and human_rate(status.training_tokens_per_s) in speed
    assert f"{human_rate(status.inference_samples_per_s)} samples/s captured" in speed
    assert f"step {status.step:,} of {status.total_steps:,}" in tile(page, "Time left")
    assert human_count(status.samples["pending"]) in station(page, "prompts")
    assert human_rate(status.inference_tokens_per_s) in station(page, "inference")
    full = f"{human_bytes(point.store_bytes)}{point.store_bytes / point.store_capacity_bytes:.0%} full"
    assert full in station(page, "store")
    assert f"Queues{point.queue_depth}" in station(page, "queues")
    shown = {row[0]: row for row in rows(page, "workers")}
    assert list(shown) == [worker.name for worker in latest.workers]
    for worker in latest.workers:
        figures = [worker.doing, human_rate(worker.samples_per_s), human_rate(worker.tokens_per_s)]
        assert shown[worker.name][1:4] == figures
    assert [row[:3] for row in rows(page, "ranks")] == [
        [str(rank.rank), rank.report.doing, human_rate(rank.tokens_per_s)] for rank in latest.ranks
    ]
