"""Kills or stops a random part of short online runs at a random moment, and looks at what came of it.

    python -m benchmarks.fault_rounds [--rounds 20] [--seed 0] [--hang-seconds 10] [--only engine trainer ...]

Each round is one run of ``tests/online.py`` (the 135M target in SGLang, Mooncake, Ray, 48 samples in 12 steps, two
engines) in which one process gets a SIGKILL, or a SIGSTOP and so hangs. A run whose driver was killed is resumed by the
script, as a scheduler's requeue would; in all others nobody helps.

- *Detected* and *repaired* are seconds from the signal to the first word about it in the run's output, and to the next
  optimizer step after that; empty where the run had ended before. A resumed driver is detected when it is resumed.
- *Steps again* were made and undone by going back to the last checkpoint; they are no part of the trained draft.
- *Lost* and *repeated* count samples over the whole run, *batches* says whether every step had its seeded batch.
- *Loss* is the largest relative difference of a step's loss to an undisturbed run; the *noise* between two undisturbed
  runs is given for comparison.

Prints a table and writes benchmarks/results/fault_rounds.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.online import (
    STEPS,
    Command,
    journal,
    losses,
    part_of,
    processes_of,
    run_to_end,
    seeded_batches,
    signal_part,
    sorted_batches,
    steps_done,
    wait_until_gone,
    write_config,
)
from torchspec.controller.journal import read_lines
from torchspec.inference.target_checkpoint import CACHE, MODEL, build

RESULTS = Path(__file__).parent / "results" / "fault_rounds.json"
PARTS = ("worker", "engine", "detokenizer", "trainer", "controller", "node", "master", "driver")
WORDS = ("died", "hangs", "no sign of life", "failed:", "starts again", "starting it again", "starting another")
"""What the run says when it has noticed something."""
LAST_STEP = STEPS - 2
"""A part is disturbed while there is still something to do."""
ROUND_SECONDS = 900


@dataclass(frozen=True)
class Round:
    """What was done, and what came of it. Times in seconds."""

    part: str
    signal: str
    after_step: int
    detected: float | None
    repaired: float | None
    steps_again: int
    lost: int
    repeated: int
    batches_equal: bool
    loss_difference: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-seconds", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    cache = CACHE.expanduser()
    target = cache / MODEL
    build(target, cache / "wheels")
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torchspec-rounds-") as name:
        folder = Path(name)
        knobs = ("inference.workers=2", f"recovery.hang_seconds={options.hang_seconds}", "recovery.start_seconds=180")
        undisturbed = [_undisturbed(folder / f"undisturbed{i}", target, knobs) for i in range(2)]
        noise = _difference(*undisturbed)
        rounds = []
        for number in range(options.rounds):
            part, kind = chance.choice(options.only), chance.choice((signal.SIGKILL, signal.SIGSTOP))
            if part == "driver":
                kind = signal.SIGKILL  # a stopped driver stops nothing: the run goes on when it does
            moment = chance.randint(0, LAST_STEP), chance.uniform(0, 3)
            rounds.append(_play(folder / f"round{number}", target, knobs, part, kind, *moment, undisturbed[0]))
            Console().print(f"{number + 1}/{options.rounds}: {rounds[-1]}", highlight=False)
            _report(rounds, noise, options)


def _play(
    folder: Path,
    target: Path,
    knobs: tuple[str, ...],
    part: str,
    kind: signal.Signals,
    after_step: int,
    delay: float,
    expected: list[float],
) -> Round:
    """One run with one disturbance."""
    run_dir, started = folder / "run", time.monotonic()
    folder.mkdir(parents=True)
    command = Command(folder, "train", write_config(folder, target), *knobs)
    try:
        command.wait_for(lambda: _there(run_dir, part) and steps_done(run_dir) >= after_step, f"step {after_step}")
        time.sleep(delay)
        told, at = len(command.text), steps_done(run_dir)
        disturbed = time.monotonic()
        if part == "driver":
            command.process.kill()
            wait_until_gone(run_dir)
            command, told = Command(folder, "resume", run_dir), 0
            detected = _seconds_until(lambda: _count(run_dir, "started") == 2, command, disturbed)
        else:
            signal_part(run_dir, part, kind)
            detected = _seconds_until(lambda: any(w in command.text[told:] for w in WORDS), command, disturbed)
        made = _count(run_dir, "trained")
        repaired = _seconds_until(lambda: _count(run_dir, "trained") > made, command, disturbed)
        assert command.wait(ROUND_SECONDS) == 0, command.text
    finally:
        command.process.kill()
    assert processes_of(run_dir) == []
    found, wanted = journal(run_dir), seeded_batches()
    counts = Counter(sample for batch in found.values() for sample in batch)
    result = Round(
        part=part,
        signal=kind.name,
        after_step=at,
        detected=detected,
        repaired=repaired,
        steps_again=_count(run_dir, "trained") - STEPS,
        lost=len({sample for batch in wanted.values() for sample in batch} - counts.keys()),
        repeated=sum(count - 1 for count in counts.values()),
        batches_equal=sorted_batches(found) == sorted_batches(wanted),
        loss_difference=_difference(losses(run_dir), expected),
        seconds=round(time.monotonic() - started, 1),
    )
    shutil.rmtree(folder)
    return result


def _seconds_until(condition: Callable[[], bool], command: Command, since: float) -> float | None:
    """Seconds until something is so; None if the run ends first."""
    deadline = time.monotonic() + ROUND_SECONDS
    while not condition():
        if command.process.poll() is not None:
            return None
        assert time.monotonic() < deadline, command.text
        time.sleep(0.05)
    return round(time.monotonic() - since, 2)


def _undisturbed(folder: Path, target: Path, knobs: tuple[str, ...]) -> list[float]:
    folder.mkdir()
    run_to_end(folder, "train", write_config(folder, target), *knobs)
    return losses(folder / "run")


def _there(run_dir: Path, part: str) -> bool:
    return (run_dir / "handle.json").exists() if part == "driver" else bool(part_of(run_dir, part))


def _count(run_dir: Path, event: str) -> int:
    return sum(record["event"] == event for record in read_lines(run_dir / "ledger.jsonl"))


def _difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _report(rounds: list[Round], noise: float, options: argparse.Namespace) -> None:
    """The table and the file, after every round: a long series that is cut short leaves what it has."""
    table = Table(title=f"{len(rounds)} rounds; losses of two undisturbed runs differ by {noise:.1e}")
    for name in ("part", "signal", "after step", "detected s", "repaired s", "steps again", "lost", "repeated"):
        table.add_column(name, justify="left" if name in ("part", "signal") else "right")
    table.add_column("batches")
    table.add_column("loss differs by", justify="right")
    for r in rounds:
        equal = "equal" if r.batches_equal else "DIFFER"
        figures = r.after_step, r.detected, r.repaired, r.steps_again, r.lost, r.repeated
        shown = ["" if figure is None else str(figure) for figure in figures]
        table.add_row(r.part, r.signal, *shown, equal, f"{r.loss_difference:.1e}")
    if len(rounds) == options.rounds:
        Console().print(table)
    settings = {"seed": options.seed, "hang_seconds": options.hang_seconds, "machine": platform.processor() or "x86_64"}
    tree = {"settings": settings, "undisturbed_noise": noise, "rounds": [asdict(r) for r in rounds]}
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
