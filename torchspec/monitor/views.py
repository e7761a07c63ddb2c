"""A run's folder as the page asks for it: columns for charts, what is new since a moment, one sample in words.

Plain dicts and lists, ready for JSON. Nothing here talks to a running process: a folder is enough.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from torchspec.data.masks import unpack_mask
from torchspec.monitor.bottleneck import Verdict, judge_run
from torchspec.monitor.health import Health, assess_run
from torchspec.monitor.metrics import METRICS, PER_POSITION, prometheus_name
from torchspec.monitor.series import lines_of, read_series, tail, thin
from torchspec.monitor.snapshot import RANK_COLUMNS, RANK_PARTS, WORKER_COLUMNS, Snapshot, adapter, read_latest
from torchspec.run_folder import RunFolder

Record = dict[str, Any]
Columns = dict[str, list[Any]]
Pair = tuple[Record | None, Record]
"""A record and the one before it."""

GAUGES = (
    "step",
    "queue_depth",
    "store_bytes",
    "store_capacity_bytes",
    "credit_bytes",
    "workers",
    "workers_waiting",
    "ranks",
    "ranks_waiting",
)
RATES = {
    "inference_samples_per_s": "captured_samples",
    "inference_tokens_per_s": "captured_tokens",
    "answer_tokens_per_s": "answer_tokens",
    "training_samples_per_s": "trained_samples",
    "training_tokens_per_s": "trained_tokens",
    "put_bytes_per_s": "put_bytes",
    "get_bytes_per_s": "get_bytes",
    "credit_blocked_share": "credit_blocked_seconds",
    "window_blocked_share": "window_blocked_seconds",
}
"""Column to the counter whose growth a second it is."""
STEP_VALUES = ("time", "step", "loss", "accept_length", "learning_rate", "grad_norm", "tokens")


def run_view(run_dir: Path) -> Record:
    """What does not change, and how the run is doing now."""
    config = RunFolder(run_dir).config
    return {
        "name": run_dir.resolve().name,
        "folder": str(run_dir.resolve()),
        "config": yaml.safe_load(config.read_text()) if config.exists() else {},
        "metrics": [{**asdict(m), "key": m.key, "prometheus": prometheus_name(m)} for m in METRICS],
        **now_view(run_dir),
    }


def now_view(run_dir: Path) -> Record:
    live = RunFolder(run_dir).is_live()
    latest, verdict = read_latest(run_dir), judge_run(run_dir, live)
    health = assess_run(run_dir, latest, live, time.time())
    return {
        "live": live,
        "snapshot": adapter(Snapshot).dump_python(latest, mode="json") if latest else None,
        "verdict": adapter(Verdict).dump_python(verdict, mode="json"),
        "health": adapter(Health).dump_python(health, mode="json"),
    }


def history_view(run_dir: Path, since: float | None = None, points: int | None = None) -> Columns:
    """Gauges as they are, counters as means between neighbouring rows.

    Args:
        since: rows after this time only; the last row of an earlier answer.
        points: at most so many rows.
    """
    pairs = _pairs(RunFolder(run_dir).history, since, points)
    columns: Columns = {"time": [b["time"] for _, b in pairs]}
    for name in GAUGES:
        columns[name] = [b[name] for _, b in pairs]
    for state in sorted({state for _, b in pairs for state in b["samples"]}):
        columns[f"samples_{state}"] = [b["samples"].get(state, 0) for _, b in pairs]
    for name, counter in RATES.items():
        columns[name] = [_growth(a, b, counter, "time") for a, b in pairs]
    for part in RANK_PARTS:
        columns[f"rank_{part}_share"] = [_growth(a, b, f"rank_{part}_seconds", "rank_seconds") for a, b in pairs]
    columns["worker_wait_share"] = [_rest(_growth(a, b, "worker_busy_seconds", "worker_seconds")) for a, b in pairs]
    columns["worker_engine_share"] = [_growth(a, b, "worker_engine_seconds", "worker_seconds") for a, b in pairs]
    return columns


def entities_view(run_dir: Path, since: float | None = None, points: int | None = None) -> Record:
    """The same for each worker and each rank; None where there was none."""
    pairs = _pairs(RunFolder(run_dir).entities, since, points)
    workers = {
        "samples_per_s": lambda a, b: _growth(a, b, "samples", "seconds"),
        "tokens_per_s": lambda a, b: _growth(a, b, "tokens", "seconds"),
        "put_bytes_per_s": lambda a, b: _growth(a, b, "put_bytes", "seconds"),
        "wait_share": lambda a, b: _rest(_growth(a, b, "busy_seconds", "seconds")),
    }
    ranks = {
        "tokens_per_s": lambda a, b: _growth(a, b, "tokens", "seconds"),
        "get_bytes_per_s": lambda a, b: _growth(a, b, "get_bytes", "seconds"),
        "wait_share": lambda a, b: _growth(a, b, "wait_seconds", "seconds"),
        "fetched_steps": lambda a, b: b["fetched_steps"],
    }
    return {
        "time": [b["time"] for _, b in pairs],
        "workers": _entities(pairs, "workers", WORKER_COLUMNS, workers),
        "ranks": _entities(pairs, "ranks", RANK_COLUMNS, ranks),
    }


def steps_view(run_dir: Path, since: float | None = None, points: int | None = None) -> Record:
    """Curves of training and of held-out samples. With ``points``, every so many-th step."""
    path = RunFolder(run_dir).steps
    if since is not None:
        records = tail(path, since)
    else:
        lines = lines_of(path)
        heldout = [line for line in lines if b'"split": "heldout"' in line]
        train = [line for line in lines if b'"split": "train"' in line]
        if points is not None:
            train = thin(train, points, 1)
        records = sorted(map(json.loads, (*train, *heldout)), key=lambda r: r["time"])
    train_steps, heldout_steps = undo(records)
    return {"train": _step_columns(train_steps), "heldout": _step_columns(heldout_steps)}


COURSES = {"history": history_view, "entities": entities_view, "steps": steps_view}
"""What a chart is told: from a folder, ``since`` and ``points``, as :func:`history_view` says."""


def undo(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records of training steps and of held-out evaluations, each by increasing step.

    A resumed run writes steps again: the later record of a step wins, and what came after it before is undone.
    """
    train: list[Record] = []
    heldout: list[Record] = []
    for record in records:
        own, other = (train, heldout) if record["split"] == "train" else (heldout, train)
        while own and own[-1]["step"] >= record["step"]:
            own.pop()
        while own is train and other and other[-1]["step"] > record["step"]:
            other.pop()
        own.append(record)
    return train, heldout


def events_view(run_dir: Path, since: float | None = None) -> Record:
    path = RunFolder(run_dir).events
    return {"events": read_series(path) if since is None else tail(path, since)}


def update_view(run_dir: Path, since: dict[str, float]) -> Record:
    """Everything that is new; ``since`` says for each part what the caller has."""
    update = now_view(run_dir)
    update |= {name: view(run_dir, since[name]) for name, view in COURSES.items() if name in since}
    return update | (events_view(run_dir, since["events"]) if "events" in since else {})


def samples_view(run_dir: Path) -> Record:
    """The followed samples, newest first, without their tokens."""
    records = read_series(RunFolder(run_dir).samples)
    return {"samples": [{k: v for k, v in r.items() if k not in ("token_ids", "loss_mask")} for r in reversed(records)]}


def sample_view(run_dir: Path, sample: str) -> Record:
    """One sample with its text, token by token.

    Raises:
        KeyError: it was not followed.
    """
    found = [r for r in read_series(RunFolder(run_dir).samples) if r["sample"] == sample]
    if not found:
        raise KeyError(sample)
    record = found[-1]
    ids = np.frombuffer(b64decode(record.pop("token_ids")), "<i4").tolist()
    mask = unpack_mask(b64decode(record.pop("loss_mask")), len(ids))
    pieces, special = _decode(run_dir, ids)
    return {**record, "pieces": pieces, "special": special, "mask": [int(m) for m in mask]}


def _decode(run_dir: Path, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """Each token as text, and whether it is special; numbers where the target's tokenizer is not there any more."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    config = yaml.safe_load(RunFolder(run_dir).config.read_text())
    path = Path(config["target"]["path"]) / "tokenizer.json"
    if not path.exists():
        return [f"⟨{i}⟩" for i in ids], [0] * len(ids)
    tokenizer, stream = Tokenizer.from_file(str(path)), DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer, i) or "" for i in ids]  # a character of several tokens comes with the last
    added = tokenizer.get_added_tokens_decoder()
    return pieces, [int(i in added and added[i].special) for i in ids]


def _pairs(path: Path, since: float | None, points: int | None) -> list[Pair]:
    """Each record after ``since`` with the one before it, where its rates start; with ``points``, not the first."""
    if since is not None and points is None:
        records = tail(path, since, before=True)
    else:
        records = read_series(path, since, points)
    pairs = list(zip([None, *records], records, strict=False))
    return [(a, b) for a, b in pairs if since is None or b["time"] > since]


def _growth(a: Record | None, b: Record, counter: str, by: str) -> float | None:
    if a is None or b[by] <= a[by] or b[counter] < a[counter]:
        return None
    return (b[counter] - a[counter]) / (b[by] - a[by])


def _entities(
    pairs: Sequence[Pair],
    kind: str,
    names: Sequence[str],
    columns: dict[str, Callable[[Record | None, Record], Any]],
) -> dict[str, Columns]:
    def of(entity: str, record: Record | None) -> Record | None:
        if record is None or entity not in record[kind]:
            return None
        return dict(zip(names, record[kind][entity], strict=True))

    found: dict[str, Columns] = {}
    for entity in sorted({name for _, b in pairs for name in b[kind]}):
        rows = [(of(entity, a), of(entity, b)) for a, b in pairs]
        found[entity] = {
            name: [None if b is None else column(a, b) for a, b in rows] for name, column in columns.items()
        }
    return found


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _step_columns(records: Sequence[Record]) -> Columns:
    columns: Columns = {name: [r[name] for r in records] for name in STEP_VALUES}
    for name in PER_POSITION:
        length = len(records[0][name]) if records else 0
        columns[name] = [[r[name][t] for r in records] for t in range(length)]
    return columns
