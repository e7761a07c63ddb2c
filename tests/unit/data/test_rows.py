"""Rows come out of files one at a time, with their numbers and how far the files have been read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from torchspec.data import conversations
from torchspec.data import rows as module
from torchspec.data.conversations import Conversation, Rejected, read_conversations
from torchspec.data.prompt_sources import find_files
from torchspec.data.rows import read_rows

ROWS = [{"id": f"r{i}", "prompt": f"Count to {i}. 🦜"} for i in range(50)]


def prompts(*files: Path) -> list[str]:
    return [row.messages[0]["content"] for row in read_conversations(files) if isinstance(row, Conversation)]


def test_lines_arrays_and_tables_hold_the_same_rows(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(module, "PIECE", 64)
    lines, array, table = (tmp_path / f"rows.{kind}" for kind in ("jsonl", "json", "parquet"))
    lines.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    array.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    for file in (lines, array, table):
        assert prompts(file) == [row["prompt"] for row in ROWS]
        shares = [row.share for row in read_rows([file])]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1, abs=0.1)
    (tmp_path / "notes.txt").touch()
    assert find_files(str(tmp_path), tmp_path) == [array, lines, table]
    assert [row.where for row in read_rows([lines])][:2] == [f"{lines}:1", f"{lines}:3"]
    assert [row.where for row in read_rows([array])][:2] == [f"{array}:1", f"{array}:2"]


def test_what_a_column_lacks_is_absent(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [{"name": "tell", "arguments": {"town": "Oslo"}}, {"name": "tell", "arguments": {"day": "today"}}]
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [c]}]} for c in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [row.messages[1]["tool_calls"][0]["function"] for row in read_conversations([tmp_path / "rows.parquet"])]
    assert found == calls


@pytest.mark.parametrize("end", ['{"prompt": "cut o', ""])
def test_an_array_that_is_cut_off_ends_in_a_malformed_row(tmp_path, end):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS)[:-1] + "," + end)
    *whole, last = read_conversations([file])
    assert len(whole) == len(ROWS)
    assert isinstance(last, Rejected) and last.malformed and last.where == f"{file}:51"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_row_longer_than_any_conversation_is_malformed_and_never_in_memory_whole(tmp_path, monkeypatch, kind):
    for name in (module, conversations):
        monkeypatch.setattr(name, "LONGEST", 1 << 20)
    monkeypatch.setattr(module, "PIECE", 1 << 16)
    giant = {"prompt": "x" * (10 << 20)}
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[1], giant, ROWS[2], giant)))
    else:
        file.write_text(json.dumps([ROWS[1], giant, ROWS[2]]))
    tracemalloc.start()
    first, bad, *more = read_conversations([file])
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert first.id == "r1" and bad == Rejected(
        "rows:2", f"{file}:2", "longer than 1 MiB, or JSON without an end", malformed=True
    )
    assert [row.id for row in more] == (["r2", "rows:4"] if kind == "jsonl" else []), "an array ends with it"


def test_a_json_file_of_lines_is_read_by_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert prompts(file) == [row["prompt"] for row in ROWS]


def test_a_set_of_the_hub_is_kept_as_a_file(tmp_path, monkeypatch):
    import datasets

    asked, load, source = [], datasets.load_dataset, tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return load("json", data_files=str(source), split="train", cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (file,) = find_files("hub:owner/name/subset:test", tmp_path)
    assert asked == [(("owner/name", "subset"), {"split": "test"})]
    assert prompts(file) == [row["prompt"] for row in ROWS]
    assert find_files("hub:owner/name/subset:test", tmp_path) == [file]

    def absent(*arguments, **named):
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        ValueError, match=r"^data\.train hub:owner/name: Dataset 'owner/name' doesn't exist on the Hub$"
    ):
        find_files("hub:owner/name", tmp_path)
