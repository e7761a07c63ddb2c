"""Files that are complete or absent, secrets among them, and files of JSON lines that are appended to.

The first stay so whoever else writes them at the same time and however the machine ends. Each line is handed to the
system by itself, so that a ``kill -9`` costs at most a torn last one, which readers skip. What else may happen to a
line (a power cut, a file server that has crashed) costs that line alone: readers pass it over, and say so.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, BinaryIO

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], durable: bool = False) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``. Makes the folder.

    Args:
        durable: it is on the disk when this returns, and outlives the machine's sudden end.

    Raises:
        OSError: names a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with naming(path), scratch.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
        if durable:
            sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever the system has to say about a file that is open says of which: of itself it says so of names only."""
    try:
        yield
    except OSError as error:
        if error.strerror and not error.filename:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Returns when the names in ``folder`` are on the disk: those of new, renamed and removed files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_secret(path: Path) -> str:
    """The secret in ``path``, made the first time, complete or absent; from here on its owner alone can read it."""
    if not (path.exists() and path.stat().st_size):
        path.unlink(missing_ok=True)
        scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # somebody else has made it meanwhile
                os.link(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    path.chmod(0o600)
    return path.read_text()


class LineFile:
    """A file that whole lines are appended to; it stays open. A last line that a crash has torn goes."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._path = path
        self._file = path.open("ab", buffering=0)
        sync_folder(path.parent)

    def append(self, line: bytes) -> None:
        """Add a line, with its line feed.

        Raises:
            OSError: names the file; no part of the line is in it.
        """
        end, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            with naming(self._path):
                while written < len(line):
                    written += self._file.write(line[written:])
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise

    def sync(self) -> None:
        """Returns when all that has been written is on the disk. Raises OSError: names the file."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def at_once(call: Callable[..., Any], *args: Any) -> None:
    """What :class:`JsonLines` does with its calls by itself."""
    call(*args)


class JsonLines:
    """Appends objects to a file.

    Args:
        put: makes the calls that touch the disk, in order, now or later; default: now.
    """

    def __init__(self, path: Path, put: Callable[..., Any] = at_once):
        self._file, self._put = LineFile(path), put

    def write(self, record: dict[str, Any]) -> int:
        """Append ``record``. Returns the bytes of its line."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._put(self._file.append, line)
        return len(line)

    def sync(self) -> None:
        """All that has been written so far is on the disk, once this call has been made."""
        self._put(self._file.sync)

    def close(self) -> None:
        self._put(self._file.close)


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
