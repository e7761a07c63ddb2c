"""Files that are complete or absent, secrets among them, and files of JSON lines that are appended to.

The first stay so whoever else writes them at the same time and however the machine ends. Lines are flushed at every
write, so that a ``kill -9`` costs at most a torn last one, which readers skip.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any


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


def _drop_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:  # which cannot be mapped
        return
    with path.open("rb+") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            kept = content.rfind(b"\n") + 1  # looks from the end
        file.truncate(kept)
