"""How a run ends when its folder cannot be written to: in one line that says why, whatever else then fails, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec.config.load import parse_config
from torchspec.driver import run
from torchspec.driver.supervise import RunFailed
from torchspec.run_folder import RunFolder

VIEW: Any = SimpleNamespace(message=lambda text: None, log_to=lambda path: None)


def full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")
        file.flush()


def train(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    session: Callable[[], None],
    cleanup: Callable[[], None] = lambda: None,
) -> None:
    """A run whose only real part is how it ends."""

    @contextmanager
    def launch(prepared: Any, view: Any) -> Iterator[Any]:
        try:
            yield SimpleNamespace(run=session)
        finally:
            cleanup()

    monkeypatch.setattr(
        run, "prepare", lambda config, resume, message, start: SimpleNamespace(folder=RunFolder(tmp_path))
    )
    monkeypatch.setattr(run, "_launch", launch)
    run.train(parse_config({"target": {"path": "unused"}}), resume=False, view=VIEW)


def test_a_driver_whose_disk_is_full_says_so_and_how_to_go_on(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunFailed, match=rf"No space left on device; continue with: torchspec resume {tmp_path}$"):
        train(monkeypatch, tmp_path, full_disk)
    assert "No space left" in (tmp_path / "metrics" / "events.jsonl").read_text()


def test_a_failure_that_cannot_be_written_down_nor_cleaned_up_after_is_told_all_the_same(monkeypatch, tmp_path):
    def fail() -> None:
        raise RunFailed("trainer rank 0 failed: it ate itself")

    (tmp_path / "metrics").touch()  # where the folder of the events would be
    with pytest.raises(RunFailed, match=r"^trainer rank 0 failed: it ate itself; start it again$"):
        train(monkeypatch, tmp_path, fail, full_disk)


@pytest.mark.parametrize("begun", [False, True])
def test_the_vocabulary_of_a_launch_that_failed_early_is_not_that_of_the_next(monkeypatch, tmp_path, begun):
    def stop(config: Any, plan: Any, temp_dir: Path) -> None:
        raise RunFailed("far enough")

    folder = RunFolder(tmp_path)
    folder.draft_vocab.touch()
    if begun:
        folder.config.touch()
    monkeypatch.setattr(run, "Janitor", lambda mark, temp_dir: SimpleNamespace(close=temp_dir.rmdir))
    monkeypatch.setattr(run, "start_cluster", stop)
    prepared: Any = SimpleNamespace(config=None, folder=folder, go_back_to=None, mark="mark", plan=None)
    with pytest.raises(RunFailed, match="far enough"), run._launch(prepared, VIEW):
        pass
    assert folder.draft_vocab.exists() == begun


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(monkeypatch, tmp_path, lambda: (tmp_path / "never made").read_text())


def test_a_folder_that_cannot_be_made_is_the_users_mistake(monkeypatch):
    def prepare(config: Any, resume: bool, message: Any, start: str) -> None:
        config.run_dir.mkdir(parents=True)

    monkeypatch.setattr(run, "prepare", prepare)
    config = parse_config({"target": {"path": "unused"}, "run": {"dir": "/dev/null", "name": "x"}})
    with pytest.raises(ValueError, match=r"/dev/null/x: Not a directory \(run\.dir is /dev/null/x\)"):
        run.train(config, resume=False, view=VIEW)
