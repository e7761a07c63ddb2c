"""Both pools change their sizes while a run goes on, and it trains what it would have trained anyway."""

from __future__ import annotations

import time

import pytest

from tests.online import (
    Command,
    journal,
    losses,
    processes_of,
    seeded_batches,
    sorted_batches,
    steps_done,
    wait_until_swept,
    write_config,
)
from torchspec.config.load import load_config
from torchspec.controller.verify import verify_run
from torchspec.files import read_lines

SIZES = [(1, 1), (2, 1), (1, 2)]
"""DP and SP of the generations of ranks."""


def groups(run_dir) -> list[tuple[int, int]]:
    lines = read_lines(run_dir / "ledger.jsonl")
    return [(line["dp_size"], line["sp_size"]) for line in lines if line["event"] == "group"]


def test_a_run_scaled_both_ways_trains_what_it_would_have_trained(tmp_path, target_path, undisturbed):
    """Inference 1 -> 2 -> 1; training DP 1 -> DP 2 -> SP 2."""
    run_dir, started = tmp_path / "run", time.time()
    command = Command(tmp_path, "train", write_config(tmp_path, target_path))

    def scale(after: int, *arguments: str) -> None:
        """Once step ``after`` is made, ask for other sizes."""
        command.wait_for(lambda: steps_done(run_dir) >= after, f"step {after}")
        asked = Command(tmp_path, "scale", run_dir, *arguments)
        assert asked.wait() == 0, asked.text

    try:
        scale(1, "--inference", "2", "--dp", "2")
        command.wait_for(lambda: groups(run_dir) == SIZES[:2], "two data-parallel ranks")
        refused = Command(tmp_path, "scale", run_dir, "--dp", "5")
        assert refused.wait() == 2 and "training.batch_size (4) is smaller" in refused.text
        scale(4, "--dp", "1", "--sp", "2", "--inference", "1")
        assert command.wait() == 0, command.text
    finally:
        command.process.kill()
    assert groups(run_dir) == SIZES
    assert sorted_batches(journal(run_dir)) == sorted_batches(seeded_batches())
    verdict = verify_run(run_dir)
    assert verdict.violations == () and verdict.finished and verdict.resumes == 0
    assert losses(run_dir) == pytest.approx(losses(undisturbed.folder), rel=1e-4)
    assert "worker-1 finishes what it has" in command.text and "died" not in command.text
    config = load_config(run_dir / "config.yaml")
    assert (config.inference.workers, config.training.dp_size, config.training.sp_size) == (1, 1, 2)
    assert processes_of(run_dir) == []
    wait_until_swept(started)
