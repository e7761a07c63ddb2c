"""Rows out of files: JSON lines, JSON arrays and Parquet, one at a time, however large the file is.

A row is not looked into here: a line of JSON stays text, so that parsing it can be another process's work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
PIECE = 1 << 20
"""Characters of a JSON array that are read at once."""
LONGEST = 64 << 20
"""Bytes of a row. Of what is longer, as a file that is something else, only so much and one more byte is read."""
Content = bytes | Any
Element = tuple[Content, float]
"""What a row holds, and the share of its file that ends with it."""


@dataclass(frozen=True, slots=True)
class Row:
    """What may be a conversation."""

    name: str
    """Stands in for an id: the file's stem and the row's number."""
    where: str
    """``file:number``; numbers begin with 1 and are those of lines in JSONL."""
    content: Content
    """JSON text as bytes, or what it means."""
    share: float
    """Of all files' bytes, how much has been read with this row."""


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """Every row of ``files`` but blank lines, in order."""
    sizes = [file.stat().st_size for file in files]
    total, before = max(1, sum(sizes)), 0
    for file, stem, size in zip(files, short_names(files), sizes, strict=True):
        for number, (content, share) in enumerate(_elements(file), start=1):
            if content != b"":
                yield Row(f"{stem}:{number}", f"{file}:{number}", content, (before + share * size) / total)
        before += size


def short_names(files: Sequence[Path]) -> list[str]:
    """File stems, or paths below the common folder where two stems are the same. Rows without an id are named so."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    root = os.path.commonpath([file.parent for file in files])
    return [os.path.relpath(file, root) for file in files]


def _elements(file: Path) -> Iterator[Element]:
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    with file.open("rb") as content:
        is_array = file.suffix == ".json" and content.read(PIECE).lstrip()[:1] == b"["
    return _array_elements(file) if is_array else _lines(file)


def _lines(file: Path) -> Iterator[Element]:
    size, read = max(1, file.stat().st_size), 0
    with file.open("rb") as lines:
        while line := lines.readline(LONGEST + 1):
            read += len(line)
            end = line  # of a row that is too long, the rest is passed over
            while len(end) > LONGEST and not end.endswith(b"\n"):
                end = lines.readline(LONGEST + 1)
                read += len(end)
            yield line.strip(), read / size


def _array_elements(file: Path) -> Iterator[Element]:
    """Elements of a JSON array. One that cannot be read ends the file: it comes as its own beginning, still text."""
    decode = json.JSONDecoder().raw_decode
    size, left_behind = max(1, file.stat().st_size), 0
    with file.open(encoding="utf-8", errors="surrogateescape") as source:
        text, piece = source.read(PIECE), PIECE
        at = text.index("[") + 1
        while True:
            at = next((i for i in range(at, len(text)) if text[i] not in " \t\r\n,"), len(text))
            if text[at : at + 1] == "]":
                return
            try:
                element, at = decode(text, at)
            except (ValueError, RecursionError):
                too_long = len(text) - at > LONGEST
                more = "" if too_long else source.read(piece)
                if not more:
                    begin = LONGEST + 1 if too_long else 1000
                    yield text[at : at + begin].encode(errors="replace") or b"[", 1.0
                    return
                left_behind += at
                text, at, piece = text[at:] + more, 0, 2 * piece  # an element may be larger than any piece
            else:
                piece = PIECE
                yield element, min(1.0, (left_behind + at) / size)


def _parquet_rows(file: Path) -> Iterator[Element]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid:
        raise ValueError(f"{file} is not a Parquet file") from None
    read, rows = 0, max(1, table.metadata.num_rows)
    for batch in table.iter_batches(batch_size=512):
        for row in batch.to_pylist():
            read += 1
            yield _without_nulls(row), read / rows


def _without_nulls(value: Any) -> Any:
    """Columns give every row, and every tool call, all keys that any other has; those it lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
