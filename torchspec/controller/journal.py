"""Append-only files of a run: the ledger's journal, the answers, the rejected samples, the metrics.

JSON lines, flushed at every write, so that a ``kill -9`` costs at most a torn last line, which readers skip. What must
outlive the machine's sudden end is brought to the disk by :meth:`JsonLines.sync`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from torchspec.contracts import Answer, SampleId
from torchspec.files import sync_folder


class JsonLines:
    """Appends objects to a file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a")
        sync_folder(path.parent)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when all that has been written is on the disk. Any thread may call it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a :class:`JsonLines` file, without a torn last line. Nothing if there is no file."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _drop_torn_line(path: Path, block: int = 1 << 16) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        kept = file.seek(0, os.SEEK_END)
        while kept > 0:
            start = max(0, kept - block)
            file.seek(start)
            line_feed = file.read(kept - start).rfind(b"\n")
            kept = start + line_feed + 1
            if line_feed >= 0:
                break
        file.truncate(kept)


def count_events(path: Path) -> Counter[str]:
    """How often each event is in a run's ``ledger.jsonl``."""
    return Counter(record["event"] for record in read_lines(path))


def trained_batches(path: Path) -> dict[int, list[SampleId]]:
    """Step to the samples it trained, from a run's ``ledger.jsonl``.

    A resume from checkpoint ``k`` undoes what the journal says of later steps: they were trained by weights that no
    longer exist.
    """
    steps: dict[int, list[SampleId]] = {}
    for record in read_lines(path):
        if record["event"] == "resumed":
            steps = {s: b for s, b in steps.items() if s <= record["step"]}
        elif record["event"] == "trained":
            assert record["step"] not in steps, f"step {record['step']} is in the journal twice"
            steps[record["step"]] = [SampleId(*sample) for sample in record["samples"]]
    return steps


class AnswerBook:
    """What the target wrote, by prompt. Filled from earlier files, appended to this run's ``answers.jsonl``.

    An answer belongs to the exact tokens of its prompt: with another template or another prompt under the same id it
    is not found.
    """

    def __init__(self, path: Path, reuse: Path | None = None):
        self._answers: dict[bytes, bytes] = {}  # int32: a run may have a million, a tuple takes 36 bytes a token
        self._saved: set[bytes] = set()
        for source in (reuse, path):
            for record in read_lines(source) if source else ():
                digest = bytes.fromhex(record["prompt_hash"])
                self._answers[digest] = _packed(record["token_ids"])
                if source == path:
                    self._saved.add(digest)
        self._file = JsonLines(path)

    def get(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """int32 token ids, or None where there is no answer."""
        packed = self._answers.get(_digest(prompt_ids))
        return None if packed is None else np.frombuffer(packed, dtype=np.int32)

    def add(self, prompt_id: str, prompt_ids: np.ndarray, answer: Answer) -> None:
        digest = _digest(prompt_ids)
        if digest in self._saved:
            return
        self._saved.add(digest)
        self._answers[digest] = _packed(answer.token_ids)
        self._file.write(
            {"id": prompt_id, "prompt_hash": digest.hex(), **{k: v for k, v in asdict(answer).items() if k != "prompt"}}
        )


def _packed(token_ids: Sequence[int]) -> bytes:
    return np.array(token_ids, dtype=np.int32).tobytes()


def _digest(prompt_ids: np.ndarray) -> bytes:
    """Names a prompt by its token ids."""
    return hashlib.sha256(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes()).digest()[:12]
