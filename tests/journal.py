"""What a run's journal, ``ledger.jsonl``, says: how often each event was, and what each step has trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torchspec.contracts import SampleId
from torchspec.files import read_lines


def count_events(path: Path) -> Counter[str]:
    """How often each event is in a run's ``ledger.jsonl``."""
    return Counter(record["event"] for record in read_lines(path))


def trained_batches(path: Path) -> dict[int, list[SampleId]]:
    """Step to the samples it trained, from a run's ``ledger.jsonl``.

    A resume from checkpoint ``k`` undoes what the journal says of later steps: they were trained by weights that no
    longer exist.
    """
    steps: dict[int, list[SampleId]] = {}
    for record in read_lines(path):
        if record["event"] == "resumed":
            steps = {s: b for s, b in steps.items() if s <= record["step"]}
        elif record["event"] == "trained":
            assert record["step"] not in steps, f"step {record['step']} is in the journal twice"
            steps[record["step"]] = [SampleId(*sample) for sample in record["samples"]]
    return steps
