"""Which runs live, and which run a path lies in."""

from __future__ import annotations

import json
from pathlib import Path

from torchspec.run_folder import RunFolder, this_process


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
