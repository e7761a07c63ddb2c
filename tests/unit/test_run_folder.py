"""Which runs live, who can read them, and which run a path lies in."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from torchspec.run_folder import RunFolder, this_process


def test_a_run_is_its_owners_alone_unless_somebody_opens_it(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        run = RunFolder(tmp_path / "runs" / "mine")
        run.make()
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (run.path.parent, run.path)]
        assert modes == [0o775, 0o700]
        run.path.chmod(0o750)
        run.hold().close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o750


def test_a_run_of_somebody_else_is_none(tmp_path: Path) -> None:
    run, user = RunFolder(tmp_path / "run"), os.geteuid()
    run.make()
    run.config.touch()
    assert run.exists()
    run.path.chmod(0)
    try:
        if user == 0:  # whom nothing is closed to
            os.seteuid(65534)
        assert not run.exists()
    finally:
        os.seteuid(user)
        run.path.chmod(0o700)


def test_a_run_is_not_live_because_its_drivers_number_is_taken_again(tmp_path):
    for changes, live in (({}, True), ({"started": 1}, False), ({"pid": 2**22 + 1}, False), ({"host": "other"}, True)):
        RunFolder(tmp_path).handle.write_text(json.dumps(this_process() | changes))
        assert RunFolder(tmp_path).is_live() == live


def test_the_run_around_a_draft_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    draft = run.exports / "step_000001"
    draft.mkdir(parents=True)
    assert RunFolder.around(draft) is None
    run.config.touch()
    found = RunFolder.around(draft)
    assert found is not None and found.path == run.path


def test_a_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(ValueError, match=rf"run\.dir: {tmp_path} .*Operation not supported.*flock"):
        RunFolder(tmp_path).hold()


def test_a_run_has_one_driver(tmp_path: Path) -> None:
    with RunFolder(tmp_path).hold(), pytest.raises(ValueError, match="is running already; see it with: torchspec st"):
        RunFolder(tmp_path).hold()
    RunFolder(tmp_path).hold().close()


def test_checkpoints_are_found_by_step_and_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint best; it has none"):
        run.find_checkpoint("best")
    for name in ("step_000040", "step_000200", "step_000240.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "best").symlink_to("step_000040")
    assert [run.find_checkpoint(which) for which in ("200", "40", "best")] == [
        *(run.checkpoint(step) for step in (200, 40, 40))
    ]
    for which in ("240", "2", "../checkpoints/step_000040", "worst"):
        with pytest.raises(ValueError, match=rf"has no checkpoint {which}; it has 40, 200, best"):
            run.find_checkpoint(which)


def test_a_run_goes_on_from_what_is_committed_or_not_at_all(tmp_path: Path) -> None:
    """Whoever makes room by deleting checkpoints, or sees an older ``latest``, must not train anything twice."""
    run = RunFolder(tmp_path)
    assert run.last_checkpoint(0) is None
    for step in (40, 200):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "ledger.json").touch()
    latest = run.checkpoints / "latest"
    latest.symlink_to("step_000200")
    assert run.last_checkpoint(200) == run.checkpoint(200)
    assert run.last_checkpoint(40) == run.checkpoint(200), "nobody has told of it yet"
    latest.unlink()
    latest.symlink_to("step_000040")
    assert run.last_checkpoint(200) == run.checkpoint(200), "a file system that is behind"
    (run.checkpoint(200) / "ledger.json").unlink()
    gone = r"step_000200 is gone or not complete, and ledger.jsonl says that step 200 is committed: put it back, or "
    with pytest.raises(ValueError, match=gone + rf"go on from an older one \(40\) with `torchspec resume {tmp_path} -"):
        run.last_checkpoint(200)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ValueError, match=gone + "there is no other: start a new run, with another run.name"):
        run.last_checkpoint(200)
