"""Sample timelines as a chrome trace (Trace Event Format), for chrome://tracing or ui.perfetto.dev.

Each worker and the store, the queue and the training are a process of the trace; each sample is a thread in them, so
its way goes from top to bottom.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchspec.monitor.series import read_series
from torchspec.run_folder import RunFolder

PHASES: dict[str, tuple[str, str]] = {
    "leased": ("worker", "waits for the engine"),
    "computing": ("worker", "engine"),
    "computed": ("worker", "checked"),
    "putting": ("worker", "put"),
    "stored": ("store", "waits for its step"),
    "assigned": ("store", "fetched by the ranks"),
    "fetched": ("training", "waits, then trained"),
    "trained": ("training", "removed from the store"),
    "failed": ("worker", "waits for another worker"),
    "lost": ("store", "waits for another worker"),
}
"""What a moment begins: where, and what."""


def write_trace(run_dir: Path, sample: str | None, path: Path) -> int:
    """Write the trace of ``sample``, or of all samples that were followed; returns how many.

    Raises:
        ValueError: there are none.
    """
    records = read_series(RunFolder(run_dir).samples)
    chosen = [r for r in records if sample in (None, r["sample"])]
    if not chosen:
        known = ", ".join(r["sample"] for r in records[-5:])
        raise ValueError(f"{run_dir}: {sample or 'no sample'} was not followed" + (f"; try {known}" if known else ""))
    events = [event for number, record in enumerate(chosen, start=1) for event in _events(number, record)]
    names = {event["pid"]: event["args"].pop("place") for event in events}
    titles = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in names.items()]
    path.write_text(json.dumps({"traceEvents": titles + events, "displayTimeUnit": "ms"}))
    return len(chosen)


def _events(number: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Complete events ("X"): microseconds, one from each moment to the next."""
    worker = record["worker"]
    for (moment, start, detail), (_, end, _) in itertools.pairwise(record["timeline"]):
        worker = detail if moment == "leased" else worker
        place, what = PHASES[moment]
        place = worker if place == "worker" else place
        yield {
            "ph": "X",
            "name": what,
            "cat": moment,
            "pid": _process(place),
            "tid": number,
            "ts": start * 1e6,
            "dur": max(0.0, (end - start) * 1e6),
            "args": {"place": place, "sample": record["sample"], "id": record["id"], "detail": detail},
        }


def _process(place: str) -> int:
    """A number for each place, workers first."""
    if place in ("store", "training"):
        return 1_000_000 + (place == "training")
    return 1 + int(place.rpartition("-")[2])
