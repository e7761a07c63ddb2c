"""Time series in files of bounded size: appended to all the time for days, quick to read as a whole, easy to follow.

A series is JSON lines that begin with ``{"time":...``. When it has grown to ``max_lines`` it is rewritten: the newest
lines stay as they are, and of the older ones so many that they lie evenly in time. Counters make that lossless where
it matters: the mean rate between two lines is exact, however far apart they are.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchspec.files import LineFile, write_atomically

_BEGIN = b'{"time":'
_TIME = re.compile(rb'{"time":\s*([-+.0-9eE]+)')
_parsed = lru_cache(maxsize=2048)(json.loads)


class Series:
    """Appends to a series. Of ``max_lines`` half go, but none of the ``recent`` newest."""

    def __init__(self, path: Path, max_lines: int, recent: int):
        assert recent < max_lines // 2
        self._path, self._max_lines, self._recent = path, max_lines, recent
        self._file = LineFile(path)
        self._count = len(lines_of(path))

    def append(self, line: bytes) -> None:
        """Add a line, with its line feed. Raises OSError: names the file."""
        self._file.append(line)
        self._count += 1
        if self._count >= self._max_lines:
            self._thin()

    def _thin(self) -> None:
        lines = thin(lines_of(self._path), self._max_lines // 2, self._recent)
        write_atomically(self._path, lambda file: file.writelines(lines))
        self._file.close()
        self._file, self._count = LineFile(self._path), len(lines)


def thin(lines: Sequence[bytes], most: int, recent: int) -> list[bytes]:
    """At most ``most`` of the lines: the ``recent`` newest, and older ones evenly in time, the first included."""
    if len(lines) <= most:
        return list(lines)
    old, new = lines[:-recent], lines[-recent:]
    times = [time_of(line) for line in old]
    spacing = max(times[-1] - times[0], 1e-9) / (most - recent - 1) if most - recent > 1 else float("inf")
    kept, due = [], times[0]
    for line, time in zip(old, times, strict=True):
        if time >= due:
            kept.append(line)
            due += spacing * max(1.0, (time - due) // spacing + 1)
    return [*kept, *new]


def time_of(line: bytes) -> float:
    match = _TIME.match(line)
    assert match is not None, f"a line of a series begins with its time: {line[:80]!r}"
    return float(match[1])


class Follower:
    """The newest ``kept`` records of a file, of which only what was added is read again, also once it was rewritten."""

    def __init__(self, path: Path, kept: int):
        self._path, self._records = path, deque[dict[str, Any]](maxlen=kept)
        self._inode, self._offset = 0, 0

    def read(self) -> list[dict[str, Any]]:
        """The records of now, oldest first; none where there is no file yet."""
        after = float("-inf")
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                    after = self._records[-1]["time"] if self._records else after
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            new = b""
        new = new[: new.rfind(b"\n") + 1]  # without a last line that is still being written
        self._offset += len(new)
        self._records.extend(record for record in map(json.loads, _whole_lines(new)) if record["time"] > after)
        return list(self._records)


def read_series(path: Path, since: float | None = None, max_points: int | None = None) -> list[dict[str, Any]]:
    """Records after ``since``, at most ``max_points`` (2 or more): the last, and the others evenly in time."""
    lines = lines_of(path) if since is None else tail_lines(path, since)
    if max_points is not None:
        lines = thin(lines, max_points, 1)
    return [json.loads(line) for line in lines]


def tail(path: Path, since: float, before: bool = False) -> list[dict[str, Any]]:
    """Records after ``since``, and with ``before`` the one before them; older ones are not read. Not to be changed."""
    return [_parsed(line) for line in tail_lines(path, since, before)]


def tail_lines(path: Path, since: float, before: bool = False) -> list[bytes]:
    """The lines of :func:`tail`. A view that stays open asks for the same ones again: parse each once."""
    lines = []
    for line in _backwards(path):
        older = time_of(line) <= since
        if not older or before:
            lines.append(line)
        if older:
            break
    return lines[::-1]


def _backwards(path: Path, block: int = 1 << 16) -> Iterator[bytes]:
    """Whole lines, the last first."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            lines = (file.read(end - start) + rest).splitlines(keepends=True)
            rest = lines.pop(0) if start > 0 else b""  # it may begin further up
            yield from filter(_is_whole, reversed(lines))
            end = start


def lines_of(path: Path) -> list[bytes]:
    """All whole lines, with their line feeds; none where there is no file."""
    return _whole_lines(path.read_bytes()) if path.exists() else []


def _whole_lines(data: bytes) -> list[bytes]:
    return list(filter(_is_whole, data.splitlines(keepends=True)))


def _is_whole(line: bytes) -> bool:
    """Neither still being written, nor damaged: without its beginning or its end, run into the next, or with a hole."""
    return line.startswith(_BEGIN) and line.endswith(b"}\n") and line.count(_BEGIN) == 1 and b"\0" not in line
