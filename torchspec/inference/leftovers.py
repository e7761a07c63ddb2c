"""What SGLang engines leave in ``/dev/shm``, and its removal. Standard library only.

SGLang ends its processes with SIGKILL, so the load table of every engine (``sglang_loads_*``), its shared buffers
(``sgl_shm_*``) and Python's named semaphores (``sem.mp-*``) stay behind, also after a clean stop. All of these are
mapped for as long as somebody uses them; one that no living process maps is garbage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
SGLANG_PATTERNS = ("sglang_loads_*", "sgl_shm_*")
SEMAPHORE_PATTERNS = ("sem.mp-*",)
"""Python's resource tracker removes these itself, unless it was killed with the rest."""


def find_shared_memory_leftovers(
    since: float, patterns: Sequence[str] = SGLANG_PATTERNS + SEMAPHORE_PATTERNS
) -> list[Path]:
    """This user's SGLang files that were made after ``since`` (Unix seconds) and that nobody maps."""
    if not SHARED_MEMORY.is_dir():
        return []
    made = [entry for entry in SHARED_MEMORY.iterdir() if _is_leftover(entry, since, patterns)]
    mapped = _mapped_files() if made else set()
    return [entry for entry in made if str(entry) not in mapped]


def remove_shared_memory_leftovers(
    since: float, patterns: Sequence[str] = SGLANG_PATTERNS + SEMAPHORE_PATTERNS
) -> list[str]:
    """Remove what :func:`find_shared_memory_leftovers` finds; returns the names."""
    leftovers = find_shared_memory_leftovers(since, patterns)
    for entry in leftovers:
        entry.unlink(missing_ok=True)
    return [entry.name for entry in leftovers]


def _is_leftover(entry: Path, since: float, patterns: Sequence[str]) -> bool:
    if not any(fnmatch(entry.name, pattern) for pattern in patterns):
        return False
    with contextlib.suppress(FileNotFoundError):  # its owner was faster
        status = entry.stat()
        return status.st_uid == os.getuid() and status.st_mtime >= since
    return False


def _mapped_files() -> set[str]:
    """Every file below ``/dev/shm`` that a process of this user maps."""
    files = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            for line in maps.read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
                    files.add(fields[5])
    return files
