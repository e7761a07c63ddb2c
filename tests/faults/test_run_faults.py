"""Whatever is killed, the run trains the same batches as one that was left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.journal import count_events
from tests.online import (
    Command,
    journal,
    ledger_snapshot,
    losses,
    part_of,
    processes_of,
    seeded_batches,
    signal_part,
    sorted_batches,
    steps_done,
    wait_until_gone,
    wait_until_swept,
    write_config,
)
from torchspec.controller.verify import verify_run

EXPECTED = sorted_batches(seeded_batches())


def trained(run_dir: Path) -> dict:
    return sorted_batches(journal(run_dir))


@pytest.fixture
def commands():
    running: list[Command] = []
    yield running
    for command in running:
        command.process.kill()


def test_a_run_through_every_kind_of_death_trains_what_it_would_have_trained(
    commands, tmp_path, target_path, undisturbed
):
    """An engine, a training rank, the controller, the store's master and the driver are killed; the resumed run
    finishes."""
    run_dir, started = tmp_path / "run", time.time()

    def start(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    first = start("train", write_config(tmp_path, target_path), "inference.workers=2")

    def kill(role: str, after: int, generations: int) -> None:
        """Kill it once step ``after`` is made, and wait until the run has so many generations of ranks."""
        first.wait_for(lambda: steps_done(run_dir) >= after and part_of(run_dir, role), f"step {after}")
        signal_part(run_dir, role)
        first.wait_for(
            lambda: count_events(run_dir / "ledger.jsonl")["group"] == generations,
            f"generation {generations} after {role}",
        )

    kill("engine", 1, 1)
    kill("trainer", 2, 2)
    first.wait_for(lambda: "starting another" in first.text, "another worker")
    kill("controller", 4, 3)
    kill("master", 4, 3)
    first.wait_for(lambda: "the store is back" in first.text and steps_done(run_dir) >= 7, "step 7")
    first.process.send_signal(signal.SIGKILL)
    wait_until_gone(run_dir)
    saved = ledger_snapshot(run_dir)["step"]
    assert saved in (6, 9)

    second = start("resume", run_dir, "inference.workers=1")
    assert second.wait() == 0, second.text
    assert "Traceback" not in first.text + second.text
    assert trained(run_dir) == EXPECTED
    snapshot = ledger_snapshot(run_dir)
    assert snapshot["cursor"] == snapshot["shape"]["prompts"] * snapshot["shape"]["epochs"]
    verdict = verify_run(run_dir)
    assert verdict.violations == () and verdict.finished
    assert losses(run_dir) == pytest.approx(losses(undisturbed.folder), rel=1e-4)
    assert processes_of(run_dir) == []
    wait_until_swept(started)
