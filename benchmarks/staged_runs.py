"""Three real runs, each staged so that another side is slow, and what the run's own verdict says of them.

    python -m benchmarks.staged_runs [--seconds 150] [--only inference training store]

The 135M target in SGLang, Mooncake, Ray, and the prompts of ``tests/online.py``:

    inference   long answers, a cheap draft
    training    two engines, answers that are there already, a draft with a large vocabulary and seven TTT steps
    store       large batches, a store with room for hardly more than one, and steps as long as it takes to fill it

A run goes on until its verdict has been the same for a while, at most so many seconds after its first step; then it is
stopped. Prints a table and writes benchmarks/results/staged_runs.json, where a run that is not played keeps its last
result.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.online import Command, built_target, run_to_end, steps_done, write_config
from torchspec.monitor.views import now_view

RESULTS = Path(__file__).parent / "results" / "staged_runs.json"
LONG = ("training.epochs=200", "evaluation.heldout=null", "checkpoint.every_steps=1000")
STAGES = {
    "inference": ("answer.max_tokens=96", "data.max_seq_length=256", "data.limit=600", "draft.ttt_length=1"),
    "training": (
        *("draft.ttt_length=7", "draft.vocab_size=40000", "training.batch_size=8"),
        *("controller.reorder_window=24", "inference.workers=2"),
    ),
    "store": (
        *("training.batch_size=16", "store.segment_bytes=18874368", "controller.prefetch_steps=1"),
        *("data.max_seq_length=80", "controller.reorder_window=64"),
        *("draft.ttt_length=7", "draft.vocab_size=16384"),
    ),
}
SAME = 10
"""So many looks in a row, a second apart, must agree."""


@dataclass(frozen=True)
class Stage:
    """What was staged, and what the run said of itself."""

    staged: str
    verdict: str | None
    headline: str
    text: str
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    options = parser.parse_args()
    target = built_target()
    stages = []
    with tempfile.TemporaryDirectory(prefix="torchspec-staged-") as name:
        folder = Path(name)
        run_to_end(folder, "train", write_config(folder, target, "first"))
        for staged in options.only:
            reuse = () if staged == "inference" else (f"answer.reuse={folder / 'first' / 'answers.jsonl'}",)
            config = write_config(folder, target, staged)
            stages.append(
                _play(folder / staged, staged, (str(config), *LONG, *STAGES[staged], *reuse), options.seconds)
            )
            Console().print(stages[-1], highlight=False)
    table = Table(title="What runs say of themselves")
    for column in ("staged", "verdict", "in words"):
        table.add_column(column)
    for stage in stages:
        table.add_row(stage.staged, str(stage.verdict), f"{stage.headline}: {stage.text}")
    Console().print(table)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept |= {stage.staged: asdict(stage) for stage in stages}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def _play(run_dir: Path, staged: str, arguments: tuple[str, ...], seconds: float) -> Stage:
    """One run, until it is sure of its verdict."""
    command = Command(run_dir.parent, "train", *arguments)
    try:
        command.wait_for(lambda: steps_done(run_dir) >= 1, "step 1")
        started, sides = time.monotonic(), []
        while time.monotonic() - started < seconds and (len(sides) < SAME or len(set(sides[-SAME:])) > 1):
            time.sleep(1)
            verdict = now_view(run_dir)["verdict"]
            if verdict["side"] is not None and verdict["confidence"] == "high":
                sides.append(verdict["side"])
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 0, command.text
    finally:
        command.process.kill()
    return Stage(staged, verdict["side"], verdict["headline"], verdict["text"], round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
