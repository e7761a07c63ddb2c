"""A run's folder as the page asks for it: columns for charts, what is new since a moment, one sample in words.

Plain dicts and lists, ready for JSON. Nothing here talks to a running process: a folder is enough.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from torchspec.data.masks import unpack_mask
from torchspec.monitor.bottleneck import Verdict, judge_run
from torchspec.monitor.health import Health, assess_run
from torchspec.monitor.metrics import METRICS, prometheus_name
from torchspec.monitor.series import read_series, tail, thin
from torchspec.monitor.snapshot import RANK_COLUMNS, WORKER_COLUMNS, Snapshot, adapter, read_latest
from torchspec.run_folder import RunFolder

Record = dict[str, Any]
Columns = dict[str, list[Any]]

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
RANK_PARTS = ("wait", "forward", "backward", "reduce", "optimizer", "pause")
STEP_LISTS = ("full_accuracy", "accuracy", "loss_per_position")
STEP_VALUES = ("time", "step", "loss", "accept_length", "learning_rate", "grad_norm", "tokens")


def run_view(run_dir: Path) -> Record:
    """What does not change, and how the run is doing now."""
    config = RunFolder(run_dir).config
    metrics = [
        {**{f.name: getattr(m, f.name) for f in fields(m)}, "key": m.key, "prometheus": prometheus_name(m)}
        for m in METRICS
    ]
    return {
        "name": run_dir.resolve().name,
        "folder": str(run_dir.resolve()),
        "config": yaml.safe_load(config.read_text()) if config.exists() else {},
        "metrics": metrics,
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
    records = _records(RunFolder(run_dir).history, since, points)
    pairs = _pairs(records, since)
    columns: Columns = {"time": [b["time"] for _, b in pairs]}
    for name in GAUGES:
        columns[name] = [b[name] for _, b in pairs]
    for state in sorted({state for _, b in pairs for state in b["samples"]}):
        columns[f"samples_{state}"] = [b["samples"].get(state, 0) for _, b in pairs]
    for name, counter in RATES.items():
        columns[name] = [_growth(a, b, counter, "time") for a, b in pairs]
    for part in RANK_PARTS:
        columns[f"rank_{part}_share"] = [_growth(a, b, f"rank_{part}_seconds", "rank_seconds") for a, b in pairs]
    busy = [_growth(a, b, "worker_busy_seconds", "worker_seconds") for a, b in pairs]
    columns["worker_wait_share"] = [None if share is None else 1 - share for share in busy]
    columns["worker_engine_share"] = [_growth(a, b, "worker_engine_seconds", "worker_seconds") for a, b in pairs]
    return columns


def entities_view(run_dir: Path, since: float | None = None, points: int | None = None) -> Record:
    """The same for each worker and each rank; None where there was none."""
    records = _records(RunFolder(run_dir).entities, since, points)
    pairs = _pairs(records, since)
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
        records = [r for r in tail(path, since) if r["time"] > since]
    else:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        heldout = [line for line in lines if b'"split": "heldout"' in line]
        train = [line for line in lines if b'"split": "train"' in line]
        if points is not None:
            train = thin(train, max(2, points), 1)
        records = [json.loads(line) for line in (*train, *heldout) if line.endswith(b"\n")]
        records.sort(key=lambda r: r["time"])
    train_steps, heldout_steps = undo(records)
    return {"train": _step_columns(train_steps), "heldout": _step_columns(heldout_steps)}


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
    return {"events": read_series(path) if since is None else [r for r in tail(path, since) if r["time"] > since]}


def update_view(run_dir: Path, since: dict[str, float]) -> Record:
    """Everything that is new; ``since`` says for each part what the caller has."""
    parts: dict[str, Callable[[Path, float], Any]] = {
        "history": history_view,
        "entities": entities_view,
        "steps": steps_view,
    }
    update = now_view(run_dir)
    update |= {name: view(run_dir, since[name]) for name, view in parts.items() if name in since}
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
    ids = [int.from_bytes(word, "little") for word in _words(b64decode(record.pop("token_ids")))]
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


def _records(path: Path, since: float | None, points: int | None) -> list[Record]:
    """With ``since``, the record before is there, too: what the first new rates start from."""
    if since is not None and points is None:
        return tail(path, since, before=True)
    return read_series(path, float("-inf") if since is None else since, points)


def _pairs(records: Sequence[Record], since: float | None) -> list[tuple[Record | None, Record]]:
    """Each record after ``since`` with the one before it."""
    pairs = list(zip([None, *records], records, strict=False))
    return [(a, b) for a, b in pairs if since is None or b["time"] > since]


def _growth(a: Record | None, b: Record, counter: str, by: str) -> float | None:
    if a is None or b[by] <= a[by] or b[counter] < a[counter]:
        return None
    return (b[counter] - a[counter]) / (b[by] - a[by])


def _entities(
    pairs: Sequence[tuple[Record | None, Record]],
    kind: str,
    names: Sequence[str],
    columns: dict[str, Callable[[Record | None, Record], Any]],
) -> dict[str, Columns]:
    found: dict[str, Columns] = {}
    for entity in sorted({name for _, b in pairs for name in b[kind]}):
        rows = [
            (None if a is None else _named(a[kind].get(entity), names), _named(b[kind].get(entity), names))
            for a, b in pairs
        ]
        found[entity] = {column: [None if b is None else of(a, b) for a, b in rows] for column, of in columns.items()}
    return found


def _named(values: Sequence[float] | None, names: Sequence[str]) -> Record | None:
    return None if values is None else dict(zip(names, values, strict=True))


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _step_columns(records: Sequence[Record]) -> Columns:
    columns: Columns = {name: [r[name] for r in records] for name in STEP_VALUES}
    for name in STEP_LISTS:
        length = len(records[0][name]) if records else 0
        columns[name] = [[r[name][t] for r in records] for t in range(length)]
    return columns


def _words(data: bytes) -> list[bytes]:
    return [data[i : i + 4] for i in range(0, len(data), 4)]
