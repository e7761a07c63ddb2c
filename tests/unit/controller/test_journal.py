"""What a journal says to whoever takes the run up again, whole or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.controller.journal import JournalSoFar, read_journal
from torchspec.files import Damage, JsonLines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = JsonLines(tmp_path / "ledger.jsonl")
    for line in (
        {"event": "started"},
        {"event": "group", "generation": 1},
        {"event": "committed", "step": 4},
        {"event": "group", "generation": 2},
        {"event": "committed", "step": 6},
        {"event": "trained", "step": 7},
    ):
        journal.write(line)
    return tmp_path / "ledger.jsonl"


def test_what_is_committed_and_the_last_group_are_found(path: Path) -> None:
    assert read_journal(path.with_name("absent")) == JournalSoFar(False, 0, 0)
    assert read_journal(path) == JournalSoFar(True, 2, 6)
    journal = JsonLines(path)
    journal.write({"event": "resumed", "step": 4})
    assert read_journal(path).committed_step == 4, "it has gone back on purpose"


@pytest.mark.parametrize("line", range(6))
def test_a_line_that_is_lost_takes_no_number_back(path: Path, line: int) -> None:
    """Else ranks of an earlier group were taken for those of the next."""
    lines, told = path.read_bytes().splitlines(keepends=True), list[Damage]()
    lines[line] = b"\0" * 20 + b"\n"
    path.write_bytes(b"".join(lines))
    journal = read_journal(path, told.append)
    assert journal.started and journal.generation >= 2 and told == [Damage(str(path), (line + 1,))]
    path.write_bytes(lines[line])
    assert read_journal(path, told.append).started, "and nothing that was begun is taken for new"
