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
from torchspec.inference.leftovers import find_shared_memory_leftovers


def trained(run_dir: Path) -> dict:
    return {step: sorted(batch) for step, batch in journal(run_dir).items()}


EXPECTED = {step: sorted(batch) for step, batch in seeded_batches().items()}


def steps_done(run_dir: Path) -> int:
    return max(journal(run_dir), default=0)


@pytest.fixture
def start(tmp_path, target_path):
    commands = []

    def start_command(*arguments: str) -> Command:
        config = write_config(tmp_path, target_path)
        commands.append(Command(tmp_path, "train", config, *arguments))
        return commands[-1]

    yield start_command
    for command in commands:
        command.process.kill()


def test_a_driver_killed_in_the_middle_resumes_to_the_same_ledger(start, tmp_path):
    run_dir = tmp_path / "run"
    started = time.time()
    command = start()
    command.wait_for(lambda: steps_done(run_dir) >= 5, "step 5")
    assert processes_of(run_dir, "mooncake_master") and processes_of(run_dir, "sglang::scheduler")
    command.process.send_signal(signal.SIGKILL)
    wait_until_gone(run_dir)
    resumed = run_to_end(tmp_path, "resume", run_dir)
    assert "Traceback" not in resumed.text
    assert trained(run_dir) == EXPECTED
    snapshot = ledger_snapshot(run_dir)
    assert snapshot["cursor"] == snapshot["shape"]["prompts"] * snapshot["shape"]["epochs"]
    assert processes_of(run_dir) == []
    assert find_shared_memory_leftovers(started) == []


def test_a_killed_engine_is_replaced_while_two_workers_share_the_prompts(start, tmp_path):
    run_dir = tmp_path / "run"
    command = start("inference.workers=2")
    command.wait_for(lambda: steps_done(run_dir) >= 2, "step 2")
    os.kill(processes_of(run_dir, "sglang::scheduler")[0].pid, signal.SIGKILL)
    assert command.wait() == 0, command.text
    assert "starting another" in command.text
    assert trained(run_dir) == EXPECTED


def test_ctrl_c_stops_with_a_checkpoint_and_a_resume_finishes(start, tmp_path):
    run_dir = tmp_path / "run"
    command = start()
    command.wait_for(lambda: steps_done(run_dir) >= 2, "step 2")
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 0, command.text
    stopped_at = steps_done(run_dir)
    assert ledger_snapshot(run_dir)["step"] == stopped_at < len(EXPECTED)
    assert trained(run_dir) == {step: batch for step, batch in EXPECTED.items() if step <= stopped_at}
    assert processes_of(run_dir) == []
    run_to_end(tmp_path, "resume", run_dir)
    assert trained(run_dir) == EXPECTED
