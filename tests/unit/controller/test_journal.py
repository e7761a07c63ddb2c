"""What a run's journal says."""

from __future__ import annotations

from torchspec.contracts import SampleId
from torchspec.controller.journal import trained_batches
from torchspec.files import JsonLines


def test_a_resume_undoes_later_steps(tmp_path):
    journal = JsonLines(tmp_path / "ledger.jsonl")
    for step in (1, 2, 3):
        journal.write({"event": "trained", "step": step, "samples": [[0, step]]})
    journal.write({"event": "resumed", "step": 1})
    journal.write({"event": "trained", "step": 2, "samples": [[0, 2]]})
    assert trained_batches(tmp_path / "ledger.jsonl") == {1: [SampleId(0, 1)], 2: [SampleId(0, 2)]}
