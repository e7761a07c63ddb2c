"""Which checkpoint folders stay, and that pointers always name a complete one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchspec.config.load import parse_config
from torchspec.controller.steps import GroupEnded
from torchspec.training.checkpoint import _put_in_place, partial_folder, point, prune, publish
from torchspec.training.trainer import Trainer


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


def fence_that_falls(calls: int) -> Callable[[], None]:
    """Lets so many calls pass: the generation ends in between."""
    passed: list[int] = []

    def fence() -> None:
        if len(passed) == calls:
            raise GroupEnded("generation 1 of the training group has ended")
        passed.append(1)

    return fence


def test_ranks_that_were_given_up_put_nothing_in_place(tmp_path: Path) -> None:
    newer = save(tmp_path, 2, text="of the new generation", generation=2)
    for step, calls in ((2, 0), (3, 1)):
        folder = tmp_path / f"step_{step:06d}"
        partial = partial_folder(folder, 1)
        partial.mkdir()
        (partial / "content").write_text("of one that was cut off")
        with pytest.raises(GroupEnded):
            _put_in_place(folder, 1, fence_that_falls(calls))
        assert (newer / "content").read_text() == "of the new generation"
        assert (tmp_path / "latest").resolve() == newer, "also where it was cut off between two calls"
    assert _put_in_place(tmp_path / "step_000003", 1, fence_that_falls(2)) == "No such file or directory"


def test_what_fails_once_the_checkpoint_is_safe_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"target": {"path": "unused"}, "checkpoint": {"keep": 1}})
    rank = SimpleNamespace(config=config, spec=SimpleNamespace(generation=1))
    folders = [save(tmp_path, step, written_at=step) for step in (1, 2)]
    assert Trainer._tidy(rank, folders[1], None) == (False, "") and names(tmp_path) == ["step_000002"]
    save(tmp_path, 1, written_at=1)
    point(tmp_path, "latest", folders[1])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folders[0]))

    monkeypatch.setattr("torchspec.training.checkpoint.shutil.rmtree", refuse)
    best, failure = Trainer._tidy(rank, folders[1], None)
    assert not best and failure == f"[Errno 5] Input/output error: '{folders[0]}'"
    (folders[1] / "checkpoint.json").write_text("{")
    point(tmp_path, "best", folders[1])
    best, failure = Trainer._tidy(rank, folders[1], 3.0)
    assert not best and failure.startswith("Expecting property name")
