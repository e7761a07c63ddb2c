"""A plan and a summary, as tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.commands import rendered
from torchspec.cli.tables import plan_table, summary_table
from torchspec.config.schema import TrainingConfig
from torchspec.data.survey import Survey
from torchspec.driver.memory import Split
from torchspec.driver.plan import Plan, ThreadPlan


def test_the_plan_warns_when_memory_is_short() -> None:
    splits = (
        Split(1, 1, 2, 3 << 30, 1500, "memory", configured=True),
        Split(2, 1, 4, 2 << 30, 3000, "", configured=False),
        Split(1, 8, 16, 1 << 30, 9000, "16 GPUs, 6 are left", configured=False),
    )

    def plan(memory: int, splits: tuple[Split, ...] = ()) -> Plan:
        return Plan(
            target={"architecture": "LlamaForCausalLM", "context": "8,192 tokens"},
            actors=(("inference worker", 2, "1 CPU threads"),),
            threads=ThreadPlan(1, 1),
            cores=2,
            tokens_per_sample=2048,
            sample_bytes=9_445_376,
            credit_bytes=900 << 20,
            store_samples=99,
            draft_parameters=9_800_000,
            draft="eagle3: 9 heads",
            memory_bytes=memory,
            memory_available=16 << 30,
            splits=splits,
            found={"store.segment_bytes": 6 << 30, "inference.max_concurrency": 32},
        )

    data = Survey(90, 12_345, 6_789, (("p7", "too long: 9"), ("p8", "too long: 8")), {"cut": 3}, exact=True)
    training = TrainingConfig(epochs=2, batch_size=8)
    fits, short = (rendered(plan_table(plan(size << 30), data, training)) for size in (10, 20))
    assert "90 conversations of 12,345 tokens, and up to 6,789 that the target answers" in fits
    assert "2 rejected: too long (p7, ...)" in fits and "3 changed: cut" in fits
    assert "23 of 8 samples" in fits and "9.8M trained parameters; eagle3: 9 heads" in fits
    assert "store.segment_bytes: 6.0 GiB" in fits and "inference.max_concurrency: 32" in fits
    assert "2,048 tokens, 9.0 MiB" in fits and "99 samples" in fits and "9.8M" in fits
    assert "LlamaForCausalLM" in fits and "8,192 tokens" in fits
    assert "about 10.0 GiB of 16.0 GiB" in fits
    assert "more than the machine has" in short and "more than the machine has" not in fits
    shared = rendered(plan_table(plan(10 << 30, splits), data, training))
    assert "more than the machine has" in shared and "a sample of 2,048 tokens" in shared
    rows = [" ".join(line.replace("│", " ").split()) for line in shared.splitlines()]
    assert "1 x 1 (configured) 2 3.0 GiB 1,500 tokens no: memory" in rows
    assert "2 x 1 4 2.0 GiB 3,000 tokens yes" in rows
    assert "1 x 8 16 1.0 GiB 9,000 tokens no: 16 GPUs, 6 are left" in rows


def test_the_summary_names_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.driver.run import RunSummary

    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "mine"
    export, checkpoint = run_dir / "export", run_dir / "checkpoints" / "step_000012"
    for folder in (export, checkpoint):
        folder.mkdir(parents=True)
    for stopped, exported, expected in (
        (False, export, "next: torchspec eval runs/mine"),
        (False, None, "next: torchspec export runs/mine"),
        (True, export, "next: torchspec resume runs/mine"),
    ):
        summary = RunSummary(run_dir, 12, 48, 0, 75.0, stopped, checkpoint, exported, None, None)
        text = rendered(summary_table(summary))
        assert expected in text and "runs/mine/checkpoints/step_000012" in text
    failed = RunSummary(run_dir, 12, 48, 0, 75.0, False, checkpoint, None, None, None, "the disk is full")
    assert "no export: the disk is full" in rendered(summary_table(failed))
