"""The page of a run on real parts: SGLang, Mooncake, Ray and a trainer, watched and controlled in a real browser."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.online import (
    Command,
    ledger_snapshot,
    processes_of,
    signal_part,
    steps_done,
    wait_until_swept,
    write_config,
)
from tests.page.conftest import Opener
from tests.page.reading import caught_up, check_figures, tile
from torchspec.controller.verify import verify_run

FETCHED = "path => fetch(path).then(answer => answer.text())"


@contextmanager
def still(run_dir: Path) -> Iterator[None]:
    """The controller does nothing meanwhile, for less time than it takes to be given up."""
    signal_part(run_dir, "controller", signal.SIGSTOP)
    try:
        yield
    finally:
        signal_part(run_dir, "controller", signal.SIGCONT)


def control(page: Any, name: str, then: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_text(then).wait_for()


def test_a_real_run_is_watched_and_scaled_from_its_page_and_ends_with_ctrl_c(
    tmp_path: Path, target_path: Path, undisturbed: Any, open_page: Opener
) -> None:
    run_dir, started = tmp_path / "run", time.time()
    knobs = ("training.epochs=50", f"answer.reuse={undisturbed.folder / 'answers.jsonl'}")
    command = Command(tmp_path, "train", write_config(tmp_path, target_path), *knobs)
    try:
        command.wait_for(lambda: "page: http" in command.text and steps_done(run_dir) >= 3, "step 3")
        address = re.search(r"page: (http://127\.0\.0\.1:\d+/)", command.text)[1]  # type: ignore[index]
        page = open_page(f"{address}#token={(run_dir / 'ui_token').read_text()}")
        with still(run_dir):
            check_figures(page, caught_up(page, run_dir))
        assert 'torchspec_live{run="run"} 1.0' in page.evaluate(FETCHED, "/metrics")
        assert "master_allocated_bytes" in page.evaluate(FETCHED, "/metrics/store")
        page.click("#tab-flow")
        chart, steps = page.locator("#panel-flow .plot").first, tile(page, "Time left")
        before = chart.screenshot()
        command.wait_for(lambda: chart.screenshot() != before and tile(page, "Time left") != steps, "movement", 30)

        page.get_by_role("button", name="Control").click()
        page.get_by_role("spinbutton", name="Inference workers").fill("2")
        control(page, "Scale", "the inference pool becomes 2")
        page.keyboard.press("Escape")
        page.click("#tab-workers")
        page.get_by_role("row", name="worker-1").get_by_text("starting").wait_for()
        signal_part(run_dir, "worker")
        page.get_by_role("row", name="worker-0").get_by_text("gone").wait_for(timeout=5000)

        page.close()
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 0, command.text
    finally:
        command.process.kill()
    assert "Traceback" not in command.text
    verdict = verify_run(run_dir)
    assert verdict.violations == () and not verdict.finished
    assert ledger_snapshot(run_dir)["step"] == steps_done(run_dir), "it was saved before it ended"
    assert processes_of(run_dir) == []
    wait_until_swept(started)
