"""Which checkpoint folders stay, and that pointers always name a complete one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchspec.training.checkpoint import partial_folder, point, prune, publish


def save(root: Path, step: int, written_at: int | None = None, text: str = "", generation: int = 1) -> Path:
    folder = root / f"step_{step:06d}"
    partial = partial_folder(folder, generation)
    partial.mkdir(parents=True)
    (partial / "content").write_text(text)
    publish(folder, generation)
    if written_at is not None:
        os.utime(folder, (written_at, written_at))
    point(root, "latest", folder)
    return folder


def names(root: Path) -> list[str]:
    return sorted(f.name for f in root.iterdir() if not f.is_symlink())


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        folder = save(tmp_path, step, written_at=step)
        if step == 2:
            point(tmp_path, "best", folder)
        prune(tmp_path, keep=2, generation=1)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert (tmp_path / "latest").resolve().name == "step_000005"
    assert (tmp_path / "best").resolve().name == "step_000002"


def test_newest_is_by_time_so_an_abandoned_later_step_goes_first(tmp_path: Path) -> None:
    save(tmp_path, 200, written_at=1)
    save(tmp_path, 100, written_at=2)
    save(tmp_path, 150, written_at=3)
    prune(tmp_path, keep=2, generation=1)
    assert names(tmp_path) == ["step_000100", "step_000150"]


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for partial in ("step_000002.g1.tmp", "step_000001.old.g1.tmp", "step_000003.g2.tmp"):
        (tmp_path / partial).mkdir()
    prune(tmp_path, keep=1, generation=1)
    assert names(tmp_path) == ["step_000001", "step_000003.g2.tmp"], "who comes later is at work there"
    prune(tmp_path, keep=1, generation=3)
    assert names(tmp_path) == ["step_000001"]


def test_the_same_step_again_replaces_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 7, text="abandoned")
    assert (save(tmp_path, 7, text="new") / "content").read_text() == "new"
    assert names(tmp_path) == ["step_000007"]


def test_names_are_on_the_disk_before_anything_points_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system call in its order: what a folder holds, then the folder's own name, then the pointer."""
    calls: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append(f"rename {b}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"replace {b}"), replace(a, b)))
    folder = tmp_path / "step_000001"
    partial = partial_folder(folder, 1)
    (partial / "state").mkdir(parents=True)
    publish(folder, 1)
    point(tmp_path, "latest", folder)
    contents = [f"sync {partial}", f"sync {partial / 'state'}"]
    assert calls == [
        *contents,
        f"rename {folder}",
        f"sync {tmp_path}",
        f"replace {tmp_path / 'latest'}",
        f"sync {tmp_path}",
    ]


def test_publishing_what_was_not_written_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "step_000001", 1)
