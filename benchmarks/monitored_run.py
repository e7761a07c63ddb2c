"""What monitoring costs a whole run: the same run with monitoring on and off, in turns.

    python -m benchmarks.monitored_run [--pairs 4] [--steps 120]

The 135M target in SGLang, Mooncake, Ray, and the prompts of ``tests/online.py``, whose answers are there already. *On*
is the default - snapshots, reports of every worker and rank, the page - with somebody watching: the page's update is
fetched every two seconds over one connection, as a browser does. *Off* has no history and no page. Both make the same
steps on the same samples; the first steps, while caches warm up, do not count.

A pair's overhead is the ratio of its two runs. What monitoring takes of the machine, the CPU time of the driver and the
controller tells more exactly than the time of a step, which varies by several per cent from run to run. Prints a table
and writes benchmarks/results/monitored_run.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.online import Command, built_target, processes_of, run_to_end, steps_done, write_config
from torchspec.files import read_lines
from torchspec.monitor.server import ensure_token
from torchspec.network import free_port

RESULTS = Path(__file__).parent / "results" / "monitored_run.json"
WARM_UP = 20
"""Steps."""
POLL_SECONDS = 2.0
"""The page's."""
KNOBS = ("training.epochs=1000", "evaluation.heldout=null", "checkpoint.every_steps=10000")
OFF = ("monitor.history_seconds=0", "monitor.ui=false")


@dataclass(frozen=True)
class Arm:
    """One run. CPU is that of all its processes."""

    seconds_per_step: float
    cpu_seconds_per_step: float
    driver_cpu_ms_per_s: float
    """Of the driver alone, which serves the page."""
    controller_cpu_ms_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    target = built_target()
    pairs = []
    with tempfile.TemporaryDirectory(prefix="torchspec-monitored-") as name:
        folder = Path(name)
        run_to_end(folder, "train", write_config(folder, target, "first"))
        for number in range(options.pairs):
            order = (True, False) if number % 2 else (False, True)
            arms = {on: _play(folder, target, f"{number}-{'on' if on else 'off'}", on, options.steps) for on in order}
            pairs.append(arms)
            Console().print(f"pair {number + 1}/{options.pairs}: {arms}", highlight=False)
    _report(pairs, options.steps)


def _play(folder: Path, target: Path, name: str, on: bool, steps: int) -> Arm:
    """One run, stopped when it has made its steps."""
    run_dir, port = folder / name, free_port()
    reuse = f"answer.reuse={folder / 'first' / 'answers.jsonl'}"
    choice = (f"monitor.ui_port={port}",) if on else OFF
    command = Command(folder, "train", write_config(folder, target, name), *KNOBS, reuse, *choice)
    try:
        command.wait_for(lambda: steps_done(run_dir) >= WARM_UP, "warm-up")
        with _watched(port, run_dir) if on else nullcontext():
            before = _cpu_seconds(command, run_dir)
            first = steps_done(run_dir)
            command.wait_for(lambda: steps_done(run_dir) >= first + steps, "the last step")
            after = _cpu_seconds(command, run_dir)
            last = steps_done(run_dir)
        assert run_to_end(folder, "stop", run_dir)
        assert command.wait() == 0, command.text
    finally:
        command.process.kill()
    times = {line["step"]: line["time"] for line in read_lines(run_dir / "metrics.jsonl") if line["split"] == "train"}
    seconds = times[last] - times[first]
    used = {role: after[role] - before[role] for role in after}
    made = last - first
    return Arm(
        seconds / made, sum(used.values()) / made, 1e3 * used["driver"] / seconds, 1e3 * used["controller"] / seconds
    )


@contextmanager
def _watched(port: int, run_dir: Path) -> Iterator[None]:
    """Somebody has the page open."""
    done = threading.Event()
    headers = {"Authorization": f"Bearer {ensure_token(run_dir)}"}

    def fetch() -> None:
        with closing(HTTPConnection("127.0.0.1", port)) as connection:
            while not done.wait(POLL_SECONDS):
                newest = time.time() - POLL_SECONDS
                since = "&".join(f"{name}={newest}" for name in ("history", "steps", "events"))
                connection.request("GET", f"/api/update?run=0&{since}", headers=headers)
                assert json.load(connection.getresponse())

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(fetch)
        try:
            yield
        finally:
            done.set()
        watcher.result()


def _cpu_seconds(command: Command, run_dir: Path) -> dict[str, float]:
    """Used so far by the run's processes, by those that do not compute and all others."""
    used = {"driver": _of(psutil.Process(command.process.pid)), "controller": 0.0, "others": 0.0}
    for process in processes_of(run_dir):
        role = "controller" if "ray::Controller" in " ".join(process.cmdline()) else "others"
        used[role] += _of(process)
    return used


def _of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _report(pairs: list[dict[bool, Arm]], steps: int) -> None:
    figures = {
        "seconds a step": "seconds_per_step",
        "CPU seconds a step, all processes": "cpu_seconds_per_step",
        "CPU ms a second, driver": "driver_cpu_ms_per_s",
        "CPU ms a second, controller": "controller_cpu_ms_per_s",
    }
    table = Table(title=f"A whole run, monitoring on against off ({len(pairs)} pairs of {steps} steps)")
    for heading in ("", "off", "on", "overhead", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {}
    for title, name in figures.items():
        off, on = ([getattr(arms[monitored], name) for arms in pairs] for monitored in (False, True))
        more = [b / a - 1 for a, b in zip(off, on, strict=True)]
        rows[name] = {
            "off": statistics.median(off),
            "on": statistics.median(on),
            "overhead": statistics.median(more),
            "least": min(more),
            "most": max(more),
        }
        row = rows[name]
        shares = (f"{row[key]:+.2%}" for key in ("overhead", "least", "most"))
        table.add_row(title, f"{row['off']:.4f}", f"{row['on']:.4f}", *shares)
    Console().print(table)
    more = statistics.median(_overhead_ms_per_s(arms[True]) - _overhead_ms_per_s(arms[False]) for arms in pairs)
    cpu_ms_per_s = 1e3 * rows["cpu_seconds_per_step"]["off"] / rows["seconds_per_step"]["off"]
    share = more / cpu_ms_per_s
    Console().print(f"driver and controller: {more:.1f} ms of CPU a second more, {share:.2%} of what the run uses")
    arms = [{"on" if on else "off": asdict(arm) for on, arm in pair.items()} for pair in pairs]
    RESULTS.write_text(
        json.dumps({"steps": steps, "summary": rows, "share_of_cpu": share, "pairs": arms}, indent=1) + "\n"
    )


def _overhead_ms_per_s(arm: Arm) -> float:
    return arm.driver_cpu_ms_per_s + arm.controller_cpu_ms_per_s


if __name__ == "__main__":
    main()
