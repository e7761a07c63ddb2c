"""One online run whose pools change their sizes while it goes on, and what each phase made.

    python -m benchmarks.scaling_run [--steps 8]

The 135M target in SGLang, Mooncake, Ray; each phase lasts at least ``--steps`` optimizer steps:

    inference 1 -> 3 -> 1 workers while training stays, then training DP 1 -> DP 2 -> SP 2 -> DP 1

The first epoch, in which prompts are answered, is over before the first phase begins; afterwards engines only prefill.

- *Trained* and *captured* tokens a second are of the time between a phase's first and last step: with the new size at
  work, without the change itself. On a machine whose cores are all busy, more processes make nothing faster.
- *Pause* is the longest time between two steps from the request to the end of the phase, a checkpoint and the start of
  the new ranks included; what a step takes in the phase stands beside it.

Prints a table and writes benchmarks/results/scaling_run.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.online import Command, built_target, journal, run_to_end, steps_done, write_config
from torchspec.data.order import epoch_order
from torchspec.files import read_lines

RESULTS = Path(__file__).parent / "results" / "scaling_run.json"
PHASES: list[tuple[str, tuple[str, ...]]] = [
    ("1 worker, DP 1", ()),
    ("3 workers, DP 1", ("--inference", "3")),
    ("1 worker, DP 1", ("--inference", "1")),
    ("1 worker, DP 2", ("--dp", "2")),
    ("1 worker, SP 2", ("--dp", "1", "--sp", "2")),
    ("1 worker, DP 1", ("--sp", "1")),
]
BATCH, SEED, PROMPTS, EPOCHS = 4, 5, 48, 1000
READY_SECONDS = 900


@dataclass(frozen=True)
class Phase:
    """What a phase made. Times in seconds."""

    sizes: str
    first_step: int
    last_step: int
    trained_tokens_per_s: float
    captured_tokens_per_s: float
    step_seconds: float
    pause_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    target = built_target()
    with tempfile.TemporaryDirectory(prefix="torchspec-scaling-") as name:
        folder = Path(name)
        command = Command(
            folder,
            "train",
            write_config(folder, target),
            f"data.limit={PROMPTS}",
            f"training.epochs={EPOCHS}",
            "checkpoint.every_steps=1000",
            "evaluation.every_steps=1000",
        )
        try:
            command.wait_for(lambda: steps_done(folder / "run") >= PROMPTS // BATCH, "the first epoch", READY_SECONDS)
            phases = _run(command, folder / "run", options.steps)
            run_to_end(folder, "stop", folder / "run")
            assert command.wait(READY_SECONDS) == 0, command.text
        finally:
            command.process.kill()
        _check(folder / "run")
        _report(phases)


def _run(command: Command, run_dir: Path, steps: int) -> list[Phase]:
    """Go through the phases."""
    phases = []
    for sizes, arguments in PHASES:
        asked_after = steps_done(run_dir)
        before = _times(run_dir)
        if arguments:
            asked = Command(run_dir.parent, "scale", run_dir, *arguments)
            assert asked.wait() == 0, asked.text
        command.wait_for(lambda arguments=arguments: _at_work(command, run_dir, arguments), sizes, READY_SECONDS)
        first, answered, since = steps_done(run_dir) + 1, _answered(run_dir), time.time()
        command.wait_for(lambda first=first: steps_done(run_dir) >= first + steps, sizes, READY_SECONDS)
        captured = (_answered(run_dir) - answered) / (time.time() - since)
        times = _times(run_dir)
        made = {step: (at, tokens) for step, (at, tokens) in times.items() if first <= step <= first + steps}
        seconds = made[first + steps][0] - made[first][0]
        tokens = sum(tokens for step, (_, tokens) in made.items() if step > first)
        stretch = [times[s][0] for s in sorted(times) if s >= max(asked_after, 1)]
        pause = max(b - a for a, b in pairwise(stretch)) if before else 0.0
        phases.append(
            Phase(
                sizes=sizes,
                first_step=first,
                last_step=first + steps,
                trained_tokens_per_s=round(tokens / seconds, 1),
                captured_tokens_per_s=round(captured, 1),
                step_seconds=round(seconds / steps, 2),
                pause_seconds=round(pause, 1),
            )
        )
        Console().print(str(phases[-1]), highlight=False)
    return phases


def _at_work(command: Command, run_dir: Path, arguments: tuple[str, ...]) -> bool:
    """Whether the sizes that were asked for are there, and have made a step."""
    status = _status(run_dir)
    if status is None:
        return False
    workers = [report for report in status["workers"] if report["samples"]]
    wanted = _wanted_sizes(arguments)
    there = all(status[name] == size for name, size in wanted.items())
    step = status["last_step"]
    return there and len(workers) >= status["workers_wanted"] == len(status["workers"]) and step is not None


def _wanted_sizes(arguments: tuple[str, ...]) -> dict[str, int]:
    names = {"--dp": "dp_size", "--sp": "sp_size"}
    return {names[flag]: int(size) for flag, size in zip(arguments[::2], arguments[1::2], strict=True) if flag in names}


def _status(run_dir: Path) -> dict | None:
    asked = Command(run_dir.parent, "status", run_dir, "--json")
    return json.loads(asked.text) if asked.wait() == 0 else None


def _answered(run_dir: Path) -> int:
    """Tokens captured so far, by the workers that are there."""
    status = _status(run_dir)
    assert status is not None
    return sum(report["tokens"] for report in status["workers"])


def _times(run_dir: Path) -> dict[int, tuple[float, int]]:
    """Step to when it was made, and its tokens."""
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["split"] == "train"]
    return {line["step"]: (line["time"], line["tokens"]) for line in lines}


def _check(run_dir: Path) -> None:
    """No step was lost, and every batch is the seeded one."""
    batches = journal(run_dir)
    line = [(e, int(p)) for e in range(len(batches) * BATCH // PROMPTS + 1) for p in epoch_order(SEED, e, PROMPTS)]
    assert sorted(batches) == list(range(1, len(batches) + 1))
    for step, batch in batches.items():
        assert sorted(map(tuple, batch)) == sorted(line[(step - 1) * BATCH : step * BATCH]), f"step {step}"


def _report(phases: list[Phase]) -> None:
    table = Table(title="One run through six sizes")
    table.add_column("sizes")
    for name in ("steps", "trained tokens/s", "captured tokens/s", "step s", "longest pause s"):
        table.add_column(name, justify="right")
    for p in phases:
        figures = p.trained_tokens_per_s, p.captured_tokens_per_s, p.step_seconds, p.pause_seconds
        table.add_row(p.sizes, f"{p.first_step}-{p.last_step}", *map(str, figures))
    Console().print(table)
    RESULTS.write_text(json.dumps({"phases": [asdict(p) for p in phases]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
