"""Folders that are made one a step: their names, the ``latest`` and ``best`` pointers, and which of them stay.

A folder named ``step_000123`` is complete: it was written as ``step_000123.tmp`` and renamed. Pointers are relative
symbolic links, replaced in one system call, so at every moment they name a complete folder; also after the machine's
sudden end, if what is in the files was on the disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torchspec.files import sync_folder

PARTIAL = ".tmp"


def checkpoints_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None before the first."""
    pointer = checkpoints_root(run_dir) / "latest"
    return pointer.resolve() if pointer.exists() else None


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def partial_folder(folder: Path) -> Path:
    """Where ``folder`` is written until it is complete."""
    return folder.with_name(folder.name + PARTIAL)


def publish(folder: Path) -> None:
    """Turn the partial folder into ``folder``, replacing what an abandoned run left there."""
    discard(folder)
    partial = partial_folder(folder)
    for inside in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync_folder(inside)
    partial.rename(folder)
    sync_folder(folder.parent)


def discard(folder: Path) -> None:
    """Remove ``folder``; a crash in the middle leaves a partial name, never half of a complete one."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def point(root: Path, pointer: str, folder: Path) -> None:
    """Let ``root/pointer`` name ``folder``, atomically."""
    link = root / f"{pointer}{PARTIAL}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, root / pointer)
    sync_folder(root)


def prune(root: Path, keep: int) -> None:
    """Remove all complete folders but the ``keep`` newest and those that a pointer names, and every partial one.

    Newest by time of writing: after a resume from an older checkpoint, a higher step number may be an abandoned one.
    """
    for partial in root.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)
    folders = sorted((f for f in root.glob("step_*")), key=lambda f: f.stat().st_mtime_ns, reverse=True)
    pointed = {link.resolve().name for link in root.iterdir() if link.is_symlink()}
    for folder in folders[keep:]:
        if folder.name not in pointed:
            discard(folder)
