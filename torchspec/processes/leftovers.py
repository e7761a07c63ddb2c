"""What SGLang engines leave in ``/dev/shm``, and its removal. Standard library only.

SGLang ends its processes with SIGKILL, so the load table of every engine (``sglang_loads_*``) and its shared buffers
(``sgl_shm_*``) stay behind, also after a clean stop. All of these are mapped for as long as somebody uses them; one
that no living process maps is garbage.

Python's named semaphores (``sem.mp-*``) are not looked at: nothing says whose they are. The resource tracker of the
process that made them removes them, so whoever ends processes of ours lets that one end by itself. Those of a run's
actors have names of their own, by which the run's janitor knows them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PATTERNS = ("sglang_loads_*", "sgl_shm_*")


def find_shared_memory_leftovers(since: float, folder: Path = SHARED_MEMORY) -> list[Path]:
    """This user's SGLang files that were made after ``since`` (Unix seconds) and that nobody maps."""
    made = [entry for pattern in PATTERNS for entry in folder.glob(pattern) if _is_ours(entry, since)]
    mapped = _mapped_files(folder) if made else set()
    return [entry for entry in made if str(entry) not in mapped]


def remove_shared_memory_leftovers(since: float) -> list[str]:
    """Remove what :func:`find_shared_memory_leftovers` finds; returns the names."""
    leftovers = find_shared_memory_leftovers(since)
    for entry in leftovers:
        entry.unlink(missing_ok=True)
    return [entry.name for entry in leftovers]


def _is_ours(entry: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):  # its owner was faster
        status = entry.stat()
        return status.st_uid == os.getuid() and status.st_mtime >= since
    return False


def _mapped_files(folder: Path) -> set[str]:
    """Every file below ``folder`` that a process of this user maps."""
    files = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            for line in maps.read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{folder}/"):
                    files.add(fields[5])
    return files
