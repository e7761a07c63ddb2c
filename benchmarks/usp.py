"""What sequence parallelism saves and costs: memory, time, traffic, balance, bytes read.

    python benchmarks/usp.py [--parts stored traffic time memory] [--tokens 4096] [--budget-mib 224] [--ttt-length 7]

Ranks are real processes with one thread each that talk over gloo; they take whole training steps (forward, backward,
reduction, clip, AdamW) on shards of one long sample, and every split's loss is held against that of one rank.

- *Memory* of a rank is what it has at the peak of a step above its start-up (code, process group): weights, optimizer,
  target head, shard and step. It is the peak of the resident set, in processes whose allocator gives every large block
  back at once, so nothing is counted that no longer lives. *planned* is what ``torchspec plan`` expects of the same.
- The *longest* sample is the longest among a few tried whose step stays within the budget, by interpolation.
- *Time* is the slowest rank's wall-clock time of a step, the best of the rounds; SP 1 and SP 2 take turns.
- *Traffic* is what a rank sends in one step for attention, forward and backward; the gradients' reduction is not in it.
- *Work* is a rank's CPU time in the flash kernel.
- *Bytes read* are those of a fetcher, from a real store.

Prints a table for each part and writes benchmarks/results/usp.json, in which parts that are not measured stay.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from usp_rank import TARGET, WAYS, Setup, on_ranks, peak_mib, setup_of, step_seconds, traffic_and_work
from usp_store import stored_rows

from torchspec.driver.memory import rank_memory

RESULTS = Path(__file__).parent / "results" / "usp.json"
DEGREES = (2, 4, 8)
PRELOADED = ["usp_rank", "usp_store", "torchspec.driver.memory"]
"""Imported once, by the server that all ranks are forked from."""


class Losses:
    """Asserts that every split of a sample finds the same loss."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}

    def check(self, num_tokens: int, outcomes: list[dict]) -> None:
        for outcome in outcomes:
            expected = self.known.setdefault(num_tokens, outcome["loss"])
            assert math.isclose(outcome["loss"], expected, rel_tol=1e-4), f"{num_tokens} tokens: {outcomes}, {expected}"


def measure_memory(setup: Setup, num_tokens: int, losses: Losses) -> float:
    """MiB of the rank that needs most."""
    outcomes = on_ranks(peak_mib, setup, num_tokens)
    losses.check(num_tokens, outcomes)
    return max(outcome["mib"] for outcome in outcomes)


def planned_mib(setup: Setup, num_tokens: int) -> float:
    return rank_memory(*setup, num_tokens, "bfloat16").total / 2**20


def longest(setup: Setup, budget: float, losses: Losses, attempts: int = 3) -> dict[str, float]:
    """The longest sample whose step fits: start from the plan, then follow the line through what was measured."""
    lengths = range(1, 1 << 20)
    low, high = 0, len(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planned_mib(setup, middle) <= budget else (low, middle)
    points, tried = [(0, planned_mib(setup, 1))], low
    for _ in range(attempts):
        points.append((tried, measure_memory(setup, tried, losses)))
        (x0, y0), (x1, y1) = points[-2:]
        tried = int(x1 + (0.995 * budget - y1) * (x1 - x0) / (y1 - y0))
    fitting = max(point for point in points if point[1] <= budget)
    return {"tokens": fitting[0], "mib": fitting[1]}


def memory_rows(options: argparse.Namespace) -> list[dict]:
    """Peak for one length, and the longest sample, for each way and degree."""
    rows: list[dict] = []
    losses = Losses()
    for way in WAYS:
        for degree in (1, *DEGREES):
            setup = setup_of(way, degree, options.ttt_length)
            alone = next((row for row in rows if row["degree"] == degree == 1), None)
            if alone is not None:
                rows.append({**alone, "way": way})
                continue
            fit = longest(setup, options.budget_mib, losses)
            one_rank = rows[0]["longest_tokens"] if rows else fit["tokens"]
            rows.append(
                {
                    "way": way,
                    "degree": degree,
                    "peak_mib": measure_memory(setup, options.tokens, losses),
                    "planned_mib": planned_mib(setup, options.tokens),
                    "longest_tokens": fit["tokens"],
                    "longest_to_one_rank": fit["tokens"] / one_rank,
                    "longest_mib": fit["mib"],
                    "longest_planned_mib": planned_mib(setup, fit["tokens"]),
                }
            )
    return rows


def time_rows(options: argparse.Namespace) -> list[dict]:
    losses = Losses()
    setups = {"one rank": setup_of("Ulysses", 1, options.ttt_length)}
    setups |= {way: setup_of(way, 2, options.ttt_length) for way in WAYS}
    best = dict.fromkeys(setups, math.inf)
    for _ in range(options.rounds):
        for name, setup in setups.items():
            outcomes = on_ranks(step_seconds, setup, options.tokens, 1)
            losses.check(options.tokens, outcomes)
            best[name] = min(best[name], max(outcome["seconds"] for outcome in outcomes))
    return [{"way": n, "seconds": s, "to_one_rank": s / best["one rank"]} for n, s in best.items()]


def expected_bytes(setup: Setup, num_tokens: int) -> float:
    """What one rank sends in a step of one sample, in float32, by the formulas of docs/usp.md."""
    training, steps = setup.training, setup.spec.ttt_length
    ulysses, ring = training.sp_ulysses_size, training.sp_ring_size
    queries, keys = (4 * 2 * heads * TARGET.head_dim * num_tokens for heads in (TARGET.num_heads, TARGET.num_kv_heads))
    if ulysses > 1:
        return 2 * steps * (queries + keys) / ulysses * (ulysses - 1) / ulysses
    return keys / ring * (2 * (ring - 1) if training.sp_gather_once else steps * (3 * ring - 2))


def traffic_rows(options: argparse.Namespace) -> list[dict]:
    """Traffic and balance, for both layouts."""
    rows, losses = [], Losses()
    for degree in (2, 4):
        for layout in ("contiguous", "zigzag"):
            for way in WAYS:
                setup = setup_of(way, degree, options.ttt_length, sp_layout=layout, sharding="replicated")
                outcomes = on_ranks(traffic_and_work, setup, options.tokens)
                losses.check(options.tokens, outcomes)
                work = [outcome["attention_seconds"] for outcome in outcomes]
                sent = max(outcome["sent_bytes"] for outcome in outcomes)
                assert math.isclose(sent, expected_bytes(setup, options.tokens), rel_tol=0.01)
                rows.append(
                    {
                        "way": way,
                        "degree": degree,
                        "layout": layout,
                        "sent_bytes": sent,
                        "attention_seconds": work,
                        "max_over_mean": max(work) * len(work) / sum(work),
                    }
                )
    return rows


# ---- report ----

PARTS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "stored": lambda options: stored_rows(options.stored_tokens, DEGREES, options.ttt_length),
    "traffic": traffic_rows,
    "time": time_rows,
    "memory": memory_rows,
}
TITLES = {
    "stored": "Bytes that a rank reads of a sample of {stored_tokens} tokens",
    "traffic": "Bytes that a rank sends in a step for attention, and balance, {tokens} tokens",
    "time": "Time of a step, {tokens} tokens",
    "memory": "Memory of a rank, {tokens} tokens, and the longest sample in {budget_mib} MiB",
}
COLUMNS: dict[str, dict[str, Callable[[dict], str]]] = {
    "stored": {
        "SP": lambda r: str(r["degree"]),
        "layout": lambda r: r["layout"],
        "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
        "share": lambda r: f"{r['share']:.4f}",
        "s": lambda r: f"{r['seconds']:.3f}",
    },
    "traffic": {
        "way": lambda r: r["way"],
        "SP": lambda r: str(r["degree"]),
        "layout": lambda r: r["layout"],
        "MB sent": lambda r: f"{r['sent_bytes'] / 1e6:.1f}",
        "work, max / mean": lambda r: f"{r['max_over_mean']:.2f}",
    },
    "time": {
        "way": lambda r: r["way"],
        "s": lambda r: f"{r['seconds']:.2f}",
        "to one rank": lambda r: f"{r['to_one_rank']:.2f}",
    },
    "memory": {
        "way": lambda r: r["way"],
        "SP": lambda r: str(r["degree"]),
        "MiB": lambda r: f"{r['peak_mib']:.0f}",
        "planned": lambda r: f"{r['planned_mib']:.0f}",
        "longest": lambda r: f"{r['longest_tokens']:,}",
        "to SP 1": lambda r: f"{r['longest_to_one_rank']:.2f}x",
        "MiB there": lambda r: f"{r['longest_mib']:.0f}",
        "planned there": lambda r: f"{r['longest_planned_mib']:.0f}",
    },
}


def show(part: str, rows: list[dict], options: argparse.Namespace) -> None:
    title = TITLES[part].format(**vars(options))
    table = Table(title=title, min_width=len(title))
    for name in COLUMNS[part]:
        table.add_column(name, justify="left" if name in ("way", "layout") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in COLUMNS[part].values()))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sample of all parts but the first")
    parser.add_argument("--budget-mib", type=int, default=224, help="memory of a rank that the longest sample has")
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2, help="of the timing")
    parser.add_argument("--stored-tokens", type=int, default=16384, help="length of the sample in the store")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="measure these again")
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    report["draft"] = {name: value for name, value in asdict(TARGET).items() if isinstance(value, int)}
    RESULTS.parent.mkdir(exist_ok=True)
    for part in options.parts:
        rows = PARTS[part](options)
        show(part, rows, options)
        report[part] = {"options": {k: v for k, v in vars(options).items() if k != "parts"}, "rows": rows}
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
