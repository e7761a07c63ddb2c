"""Files that are complete or absent, and files of JSON lines that are appended to.

The first stay so whoever else writes them at the same time and however the machine ends. Lines are flushed at every
write, so that a ``kill -9`` costs at most a torn last one, which readers skip. What else may happen to a line (a power
cut, a file server that has crashed) costs that line alone: readers pass it over, and say so.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, BinaryIO

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], durable: bool = False) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``. Makes the folder.

    Args:
        durable: it is on the disk when this returns, and outlives the machine's sudden end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with scratch.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
        if durable:
            sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Returns when the names in ``folder`` are on the disk: those of new, renamed and removed files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


@dataclass(frozen=True, slots=True)
class Damage:
    """Lines of a file, by number, that are no records any more and were passed over."""

    file: str
    lines: tuple[int, ...]

    def __str__(self) -> str:
        shown, others = ", ".join(map(str, self.lines[:5])), len(self.lines) - 5
        more = f" and {others:,} others" if others > 0 else ""
        return f"{self.file}: damaged and passed over: line {shown}{more}"


def read_lines(path: Path, told: Callable[[Damage], None] = log.warning) -> Iterator[dict[str, Any]]:
    """The records of a :class:`JsonLines` file, without a torn last line. Nothing if there is no file.

    Args:
        told: of damage, if there is any, once and at the end.
    """
    if path.exists():
        with path.open("rb") as file:
            yield from (record for _, record in records(file, told))


def records(file: BinaryIO, told: Callable[[Damage], None] = log.warning) -> Iterator[tuple[int, dict[str, Any]]]:
    """As :func:`read_lines`, of an open file and each with the offset of its line."""
    damaged, begin = list[int](), 0
    for number, line in enumerate(file, 1):
        if line.endswith(b"\n"):  # a last one may be torn
            record = _record(line)
            if record is None:
                damaged.append(number)
            else:
                yield begin, record
        begin += len(line)
    if damaged:
        told(Damage(file.name, tuple(damaged)))


def _record(line: bytes) -> dict[str, Any] | None:
    """None if the line is damaged."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _drop_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:  # which cannot be mapped
        return
    with path.open("rb+") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            kept = content.rfind(b"\n") + 1  # looks from the end
        file.truncate(kept)
