"""Real runs of the ``torchspec`` command for tests: SGLang, Mooncake, Ray and torch, on 24 short prompts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.journal import trained_batches
from torchspec.contracts import SampleId
from torchspec.data.builtin_target import CACHE, MODEL, build
from torchspec.data.order import epoch_order
from torchspec.processes.janitor import MARK
from torchspec.processes.leftovers import find_shared_memory_leftovers

PROMPTS, EPOCHS, BATCH, SEED = 24, 2, 4, 5
STEPS = PROMPTS * EPOCHS // BATCH

CONFIG = f"""
run: {{name: NAME, dir: DIR, seed: {SEED}}}
target: {{path: TARGET, dtype: float32}}
data: {{train: "builtin:train", limit: {PROMPTS}, max_seq_length: 192, vocab_prompts: 6}}
answer: {{max_tokens: 12}}
inference: {{max_concurrency: 8, max_total_tokens: 4096, buffer_bytes: 16777216, chunked_prefill_size: 256}}
store: {{segment_bytes: 134217728}}
controller: {{reorder_window: 12}}
draft: {{vocab_size: 512, ttt_length: 2}}
training: {{epochs: {EPOCHS}, batch_size: {BATCH}, buffer_bytes: 16777216, dtype: float32}}
optimizer: {{lr: 1.0e-3}}
evaluation: {{heldout: "builtin:heldout", samples: 4, every_steps: 6}}
checkpoint: {{every_steps: 3}}
"""


def write_config(folder: Path, target: Path, name: str = "run") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("NAME", name).replace("DIR", str(folder)).replace("TARGET", str(target)))
    return path


def built_target() -> Path:
    """The real target's checkpoint, made if it is not there yet."""
    cache = CACHE.expanduser()
    build(cache / MODEL, cache / "wheels")
    return cache / MODEL


class Command:
    """A ``torchspec`` command in the background, with its output kept for a failing test to show."""

    def __init__(self, folder: Path, *arguments: str, prefix: Sequence[str] = ()):
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "torchspec.cli.main", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 900) -> int:
        return self.process.wait(seconds)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what} after {seconds} s:\n{self.text}"
            time.sleep(0.1)


def run_to_end(folder: Path, *arguments: str) -> Command:
    command = Command(folder, *arguments)
    try:
        assert command.wait() == 0, command.text
    finally:
        command.process.kill()
    return command


def journal(run_dir: Path) -> dict[int, list[SampleId]]:
    return trained_batches(run_dir / "ledger.jsonl")


def seeded_batches(epochs: int = EPOCHS) -> dict[int, list[SampleId]]:
    """What every run of :data:`CONFIG` must train, whatever happens to it."""
    line = [SampleId(e, int(p)) for e in range(epochs) for p in epoch_order(SEED, e, PROMPTS)]
    return {step: line[(step - 1) * BATCH : step * BATCH] for step in range(1, len(line) // BATCH + 1)}


def processes_of(run_dir: Path, name: str = "") -> list[psutil.Process]:
    """Processes of the run in ``run_dir``, its driver and janitor aside, whose name or command line holds ``name``."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if (_mark(process) or "").startswith(f"{run_dir}#"):
            described = " ".join([process.info["name"] or "", *(process.info["cmdline"] or ())])
            if name in described:
                found.append(process)
    return found


ROLES = {
    "worker": "ray::InferenceWorker",
    "engine": "sglang::scheduler",
    "trainer": "ray::Trainer",
    "controller": "ray::Controller",
    "node": "ray::StoreNode",
    "master": "mooncake_master",
}
"""What the processes of a run's parts are called."""
HELPERS = {"guard": "torchspec/processes/child.py", "janitor": "torchspec.processes.janitor"}
"""What stands in the command lines of those that look after others."""


def part_of(run_dir: Path, role: str) -> list[psutil.Process]:
    """The processes that play ``role``, the oldest first; an actor that starts is called by its name, too."""
    if role in HELPERS:
        lines = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        named = [p for p, line in lines if any(word.endswith(HELPERS[role]) for word in line)]
        of_run = {p.pid for p in processes_of(run_dir)} | {
            p.pid for p, line in lines if any(word.startswith(f"{run_dir}#") for word in line)
        }
        found = [p for p in named if p.pid in of_run]
    else:
        wanted = ROLES[role].removeprefix("ray::")
        found = [p for p in processes_of(run_dir, wanted) if wanted in _title(p)]
    return sorted(found, key=lambda process: process.create_time())


def signal_part(run_dir: Path, role: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the first process that plays ``role``."""
    part_of(run_dir, role)[0].send_signal(number)


def _title(process: psutil.Process) -> str:
    """What the process calls itself; a program's name without its folder."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    return Path(command[0]).name if command else ""


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, as the last generation of ranks to make it had it."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {record["step"]: record["loss"] for record in records if record["split"] == "train"}
    return [last[step] for step in sorted(last)]


def steps_done(run_dir: Path) -> int:
    """The last step that counts, so far."""
    return max(journal(run_dir), default=0)


def sorted_batches(batches: dict[int, list[SampleId]]) -> dict[int, list[SampleId]]:
    """Comparable: ranks have no order among each other."""
    return {step: sorted(batch) for step, batch in batches.items()}


def wait_until_gone(run_dir: Path, seconds: float = 60) -> None:
    """Until no process of the run is left; a zombie that nobody has reaped yet does not count."""
    deadline = time.monotonic() + seconds
    while left := processes_of(run_dir):
        assert time.monotonic() < deadline, f"still there after {seconds} s: {left}"
        time.sleep(0.2)


def wait_until_swept(started: float, seconds: float = 60) -> None:
    """Until nothing in ``/dev/shm`` is left of engines that were ``started`` since.

    Those of tests that run beside this one count, too: one that has just been killed leaves a file for a moment.
    """
    deadline = time.monotonic() + seconds
    while left := find_shared_memory_leftovers(started):
        assert time.monotonic() < deadline, f"still there after {seconds} s: {left}"
        time.sleep(0.5)


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def ledger_snapshot(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / "latest" / "ledger.json").read_text())
