"""What engines leave in shared memory goes; what others have there stays."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from torchspec.processes.leftovers import SHARED_MEMORY, remove_shared_memory_leftovers


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_only_unmapped_files_made_since_are_removed() -> None:
    before = time.time() - 1
    mapped, orphan, other = (SHARED_MEMORY / f"{name}_torchspec_test" for name in ("sgl_shm_a", "sgl_shm_b", "mine"))
    try:
        for path in (mapped, orphan, other):
            path.write_bytes(b"x" * mmap.PAGESIZE)
        with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert orphan.name not in remove_shared_memory_leftovers(time.time() + 60)
            removed = remove_shared_memory_leftovers(before)
            assert orphan.name in removed and mapped.name not in removed
            assert mapped.exists() and other.exists() and not orphan.exists()
        assert mapped.name in remove_shared_memory_leftovers(before)
    finally:
        for path in (mapped, orphan, other):
            Path(path).unlink(missing_ok=True)
