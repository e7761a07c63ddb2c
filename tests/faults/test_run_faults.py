"""Whatever is killed, the run trains the same batches as one that was left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.online import (
    Command,
    journal,
    ledger_snapshot,
    processes_of,
    run_to_end,
    seeded_batches,
    wait_until_gone,
    write_config,
)
from torchspec.controller.journal import read_lines
from torchspec.controller.verify import verify_run
from torchspec.inference.leftovers import find_shared_memory_leftovers


def trained(run_dir: Path) -> dict:
    return {step: sorted(batch) for step, batch in journal(run_dir).items()}


EXPECTED = {step: sorted(batch) for step, batch in seeded_batches().items()}


def steps_done(run_dir: Path) -> int:
    return max(journal(run_dir), default=0)


def resumed(run_dir: Path) -> bool:
    return any(record["event"] == "resumed" for record in read_lines(run_dir / "ledger.jsonl"))


@pytest.fixture
def commands():
    running: list[Command] = []
    yield running
    for command in running:
        command.process.kill()


def test_a_run_through_every_kind_of_death_trains_what_it_would_have_trained(commands, tmp_path, target_path):
    """An engine is killed, then the driver; the resumed run is interrupted; the next one finishes."""
    run_dir, started = tmp_path / "run", time.time()

    def start(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    first = start("train", write_config(tmp_path, target_path), "inference.workers=2")
    first.wait_for(lambda: steps_done(run_dir) >= 1, "step 1")
    os.kill(processes_of(run_dir, "sglang::scheduler")[0].pid, signal.SIGKILL)
    first.wait_for(lambda: "starting another" in first.text and steps_done(run_dir) >= 4, "step 4")
    assert processes_of(run_dir, "mooncake_master")
    first.process.send_signal(signal.SIGKILL)
    wait_until_gone(run_dir)
    saved = ledger_snapshot(run_dir)["step"]
    assert saved in (3, 6)

    second = start("resume", run_dir)
    second.wait_for(lambda: resumed(run_dir) and steps_done(run_dir) > saved, f"step {saved + 1}")
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == 0, second.text
    stopped_at = steps_done(run_dir)
    assert saved < ledger_snapshot(run_dir)["step"] == stopped_at < len(EXPECTED)
    assert trained(run_dir) == {step: batch for step, batch in EXPECTED.items() if step <= stopped_at}
    assert processes_of(run_dir) == []

    last = run_to_end(tmp_path, "resume", run_dir)
    assert "Traceback" not in first.text + second.text + last.text
    assert trained(run_dir) == EXPECTED
    snapshot = ledger_snapshot(run_dir)
    assert snapshot["cursor"] == snapshot["shape"]["prompts"] * snapshot["shape"]["epochs"]
    verdict = verify_run(run_dir)
    assert verdict.violations == () and verdict.finished and verdict.resumes == 2
    assert processes_of(run_dir) == []
    assert find_shared_memory_leftovers(started) == []
