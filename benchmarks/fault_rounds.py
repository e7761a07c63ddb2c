"""Kills, stops or starves a random part of short online runs at a random moment, and looks at what came of it.

    python -m benchmarks.fault_rounds [--rounds 20] [--seed 0] [--workers 2] [--hang-seconds 10]
        [--only engine trainer ...] [--storm MINUTES]

Each round is one run of ``tests/online.py`` (the 135M target in SGLang, Mooncake, Ray, 48 samples in 12 steps) in which
one process gets a SIGKILL, or a SIGSTOP and so hangs, or something else fills the store for a while (*store*), or the
disk (*disk*, a file system of its own, which needs root). A run whose driver was killed is resumed by the script, as a
scheduler's requeue would, and one that has found its disk full once there is room again; in all others nobody helps.

A part is disturbed once the run has begun, at the earliest: what dies while a run is being launched ends it, in one
line.

- *Detected* and *repaired* are seconds from the signal to the first word about it in the run's output, and to the next
  optimizer step after that; empty where the run had ended before. A resumed driver is detected when it is resumed. A
  store that is full is waited for, and nothing is said.
- *Steps again* were made and undone by going back to the last checkpoint; they are no part of the trained draft.
- *Lost* and *repeated* count samples over the whole run, *batches* says whether every step had its seeded batch.
- *Loss* is the largest relative difference of a step's loss to an undisturbed run; the *noise* between two undisturbed
  runs is given for comparison.

Prints a table and writes benchmarks/results/fault_rounds_SEED.json.

With ``--storm`` it is one long run instead, and every 5 to 20 seconds a strike at random: a SIGKILL, or a SIGSTOP for
seconds or for good, of any process of the run, helpers and guards among them; the driver is stopped for seconds only.
After so many minutes the run is left alone and must end, with a proof of its journal, the seeded batches and no sample
rejected. *Stall* is the longest time without a step. Writes benchmarks/results/fault_storm_SEED.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from tests.journal import count_events
from tests.online import (
    HELPERS,
    ROLES,
    STEPS,
    Command,
    built_target,
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
from torchspec.controller.verify import verify_run
from torchspec.store.client import connect, pinned
from torchspec.store.endpoint import StoreEndpoint

RESULTS = Path(__file__).parent / "results"
PROCESSES = ("worker", "engine", "trainer", "controller", "node", "master", "driver")
PARTS = (*PROCESSES, "store", "disk")
STRUCK = (*ROLES, *HELPERS, "driver")
STRIKE_EVERY, STOPPED_FOR = (5.0, 20.0), (5.0, 60.0)
"""Seconds, between a least and a most."""
EPOCHS_A_MINUTE = 10
"""Of a storm, so that the run outlasts it: about half of what goes undisturbed."""
WORDS = ("died", "hangs", "no sign of life", "failed:", "starts again", "starting it again", "starting another")
"""What the run says when it has noticed something."""
LAST_STEP = STEPS - 2
"""A part is disturbed while there is still something to do."""
ROUND_SECONDS = 900
DISK_BYTES = 1 << 30
FULL_SECONDS = 15.0
"""How long a store stays full."""
BALLAST_BYTES = 256 << 10


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
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--storm", type=float, metavar="MINUTES")
    options = parser.parse_args()
    target = built_target()
    chance = random.Random(options.seed)
    if options.storm is not None:
        storm = play_storm(target, chance, options)
        Console().print(storm, highlight=False)
        (RESULTS / f"fault_storm_{options.seed}.json").write_text(json.dumps(storm, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="torchspec-rounds-") as name:
        folder = Path(name)
        knobs = (
            f"inference.workers={options.workers}",
            f"recovery.hang_seconds={options.hang_seconds}",
            "recovery.start_seconds=180",
        )
        undisturbed = [_undisturbed(folder / f"undisturbed{i}", target, knobs) for i in range(2)]
        noise = _difference(*undisturbed)
        rounds = []
        for number in range(options.rounds):
            part = chance.choice(options.only)
            kind = chance.choice(("SIGKILL", "SIGSTOP"))
            if part == "driver":
                kind = "SIGKILL"  # a stopped driver stops nothing: the run goes on when it does
            if part not in PROCESSES:
                kind = "full"
            moment = chance.randint(0, LAST_STEP), chance.uniform(0, 3)
            rounds.append(_play(folder / f"round{number}", target, knobs, part, kind, *moment, undisturbed[0]))
            Console().print(f"{number + 1}/{options.rounds}: {rounds[-1]}", highlight=False)
            _report(rounds, noise, options)


def play_storm(target: Path, chance: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    """What came of a run that outlasts a storm. Fails if it does not, or if it trains anything else than it should."""
    epochs = max(1, round(EPOCHS_A_MINUTE * options.storm))
    knobs = (
        f"inference.workers={options.workers}",
        f"recovery.hang_seconds={options.hang_seconds}",
        "recovery.start_seconds=180",
        "recovery.max_restarts=50",
        f"training.epochs={epochs}",
    )
    folder, started = Path(tempfile.mkdtemp(prefix="torchspec-storm-")), time.monotonic()
    print(f"the run's folder, which is kept: {folder}", flush=True)
    run_dir = folder / "run"
    command = Command(folder, "train", write_config(folder, target), *knobs)
    try:
        command.wait_for(lambda: _there(run_dir, "node") and steps_done(run_dir) >= 1, "step 1")
        strikes = list(_strike(run_dir, command, chance, 60 * options.storm))
        assert command.wait(ROUND_SECONDS) == 0, command.text
    finally:
        command.process.kill()
    proof = verify_run(run_dir)
    assert proof.violations == () and proof.finished, proof
    found, wanted = journal(run_dir), seeded_batches(epochs)
    assert sorted_batches(found) == sorted_batches(wanted)
    wait_until_gone(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = [record["time"] for record in records if record["split"] == "train"]
    return {
        "settings": {name: getattr(options, name) for name in ("seed", "workers", "hang_seconds", "storm")},
        "strikes": strikes,
        "steps_again": _count(run_dir, "trained") - len(wanted),
        "rejected": _count(run_dir, "rejected"),
        "stall": round(float(max(np.diff(times))), 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def _strike(run_dir: Path, command: Command, chance: random.Random, seconds: float) -> Iterator[str]:
    """Strike until the time is over or the run has ended, and say how; who was stopped for seconds goes on then."""
    started, stopped = time.monotonic(), list[tuple[float, psutil.Process]]()
    following = chance.uniform(*STRIKE_EVERY)
    while command.process.poll() is None and (stopped or time.monotonic() < started + seconds):
        time.sleep(0.1)
        now = time.monotonic() - started
        for end, process in [entry for entry in stopped if entry[0] <= now]:
            stopped.remove((end, process))
            with suppress(psutil.NoSuchProcess):
                process.resume()
        if now < following or now > seconds:
            continue
        following = now + chance.uniform(*STRIKE_EVERY)
        part, kind, pause = chance.choice(STRUCK), chance.choice(("SIGKILL", "SIGSTOP")), chance.uniform(*STOPPED_FOR)
        for_good, which = chance.random() < 0.5 and part != "driver", chance.random()
        there = [psutil.Process(command.process.pid)] if part == "driver" else part_of(run_dir, part)
        if not there:
            continue
        process = there[int(which * len(there))]
        kind = "SIGSTOP" if part == "driver" else kind
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.Signals[kind])
        lasting = kind == "SIGKILL" or for_good
        if not lasting:
            stopped.append((now + pause, process))
        how = kind if lasting else f"{kind} for {pause:.0f} s"
        strike = f"{now:.1f} s, step {steps_done(run_dir)}: {how} to {part} ({process.pid})"
        print(strike, flush=True)
        yield strike


def _play(
    folder: Path,
    target: Path,
    knobs: tuple[str, ...],
    part: str,
    kind: str,
    after_step: int,
    delay: float,
    expected: list[float],
) -> Round:
    """One run with one disturbance."""
    run_dir, started = folder / "run", time.monotonic()
    folder.mkdir(parents=True)
    with _small_disk(folder) if part == "disk" else nullcontext():
        command = Command(folder, "train", write_config(folder, target), *knobs)
        try:
            command.wait_for(lambda: _there(run_dir, part) and steps_done(run_dir) >= after_step, f"step {after_step}")
            time.sleep(delay)
            at, disturbed = steps_done(run_dir), time.monotonic()
            command, detected = _disturb(run_dir, part, kind, command)
            made = _count(run_dir, "trained")
            repaired = _seconds_until(lambda: _count(run_dir, "trained") > made, command, disturbed)
            assert command.wait(ROUND_SECONDS) == 0, command.text
        finally:
            command.process.kill()
        result = _outcome(run_dir, part, kind, at, detected, repaired, expected, started)
    shutil.rmtree(folder)
    return result


def _disturb(run_dir: Path, part: str, kind: str, command: Command) -> tuple[Command, float | None]:
    """Do it; the command that goes on, and the seconds until the disturbance was noticed."""
    told, disturbed = len(command.text), time.monotonic()
    if part == "driver":
        command.process.kill()
    elif part == "disk":
        with _no_room(run_dir):
            assert command.wait(ROUND_SECONDS) == 1 and "No space left" in command.text, command.text
            assert "Traceback" not in command.text, command.text
    elif part == "store":
        _fill_store(run_dir)
        return command, None
    else:
        signal_part(run_dir, part, signal.Signals[kind])
        return command, _seconds_until(lambda: any(w in command.text[told:] for w in WORDS), command, disturbed)
    wait_until_gone(run_dir)
    command = Command(run_dir.parent, "resume", run_dir)
    return command, _seconds_until(lambda: _count(run_dir, "started") == 2, command, disturbed)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own in ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def _no_room(run_dir: Path) -> Iterator[None]:
    """The file system of the run has not a byte left."""
    ballast = run_dir.parent / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


def _fill_store(run_dir: Path) -> None:
    """Put objects into the run's store until none fits, and keep them there for a while."""
    rpc = {name: value for name, _, value in (a.partition("=") for a in part_of(run_dir, "master")[0].cmdline())}
    address = f"{rpc['--rpc_address']}:{rpc['--rpc_port']}"
    client, keys, ballast = connect(StoreEndpoint(address, metrics="")), [], np.zeros(BALLAST_BYTES, np.uint8)
    client.register_buffer(ballast.ctypes.data, ballast.nbytes)
    try:
        until = time.monotonic() + FULL_SECONDS
        while time.monotonic() < until:
            key = f"ballast-{len(keys)}"
            if client.put_from(key, ballast.ctypes.data, ballast.nbytes, pinned()) == 0:
                keys.append(key)
            else:
                time.sleep(0.05)
    finally:
        assert keys, "nothing of ours fitted"
        for key in keys:
            client.remove(key, True)
        client.close()


def _outcome(
    run_dir: Path,
    part: str,
    kind: str,
    at: int,
    detected: float | None,
    repaired: float | None,
    expected: list[float],
    started: float,
) -> Round:
    assert processes_of(run_dir) == []
    found, wanted = journal(run_dir), seeded_batches()
    counts = Counter(sample for batch in found.values() for sample in batch)
    return Round(
        part=part,
        signal=kind,
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
    """Whether the run has begun, and has this part."""
    role = {"driver": "controller", "disk": "controller", "store": "node"}.get(part, part)
    return (run_dir / "handle.json").exists() and bool(part_of(run_dir, role))


def _count(run_dir: Path, event: str) -> int:
    return count_events(run_dir / "ledger.jsonl")[event]


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
    settings = {name: getattr(options, name) for name in ("seed", "workers", "hang_seconds")}
    settings["machine"] = platform.processor() or "x86_64"
    tree = {"settings": settings, "undisturbed_noise": noise, "rounds": [asdict(r) for r in rounds]}
    path = RESULTS / f"fault_rounds_{options.seed}.json"
    path.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
