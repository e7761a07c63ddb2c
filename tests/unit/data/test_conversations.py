"""Reading JSONL: the three forms, names, and one clear line for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchspec.data.conversations import BadLine, Conversation, read_conversations, require_clean

DATA = Path(__file__).parents[2] / "fixtures" / "data"
REASONS = {
    2: "not valid JSON: ",
    3: "not a JSON object",
    4: "has none of the keys messages, conversations, prompt",
    5: "messages is not a non-empty list",
    6: "messages[0].role is 'wizard', not one of system, user, assistant",
    7: "messages[0].content is not text",
    8: "messages[1].content is empty",
    9: "starts with an assistant turn",
    10: "has no user turn",
    11: "ends with a system turn",
    12: "messages[0] is not an object",
    13: f"its id 'good' was already given at {DATA / 'malformed.jsonl'}:1",
    14: "prompt holds half of a surrogate pair",
    15: "id is not text",
}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_three_forms_become_one():
    rows = list(read_conversations([DATA / "chats.jsonl"]))
    assert [row.id for row in rows] == ["openai", "chats:2", "7", "follow-up"]
    assert [row.answered for row in rows] == [True, True, False, False]
    assert [m["role"] for m in rows[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[1].messages == (
        {"role": "user", "content": "Wie heißt ein Papagei? 🦜"},
        {"role": "assistant", "content": "Ein Vogel, zum Beispiel Kakadu. 🦜"},
    )
    assert rows[2].messages == ({"role": "user", "content": "Write a haiku about rivers."},)


def test_each_bad_line_is_named_with_its_reason():
    rows = list(read_conversations([DATA / "malformed.jsonl"]))
    assert isinstance(rows[0], Conversation)
    for number, row in enumerate(rows[1:], start=2):
        assert isinstance(row, BadLine)
        assert row.where == f"{DATA / 'malformed.jsonl'}:{number}"
        assert row.name == f"malformed:{number}"
        assert row.reason.startswith(REASONS[number]), row
    assert len(rows) == 15


def test_all_bad_lines_are_reported_at_once():
    with pytest.raises(ValueError, match=r"data\.on_error=reject") as error:
        require_clean([DATA / "malformed.jsonl"])
    lines = str(error.value).splitlines()
    assert len(lines) == 15
    assert lines[0].startswith(f"{DATA / 'malformed.jsonl'}:2: not valid JSON")
    require_clean([DATA / "chats.jsonl"])


def test_a_flood_of_bad_lines_is_cut_at_twenty(tmp_path):
    file = write(tmp_path / "bad.jsonl", *[{}] * 50)
    with pytest.raises(ValueError, match=r"bad\.jsonl:20: .*\n\.\.\. and more\n"):
        require_clean([file])


def test_bytes_that_are_not_text_are_a_bad_line(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"prompt": "café"}\n'.encode("latin-1") + b'{"prompt": "tea"}\n')
    bad, good = read_conversations([file])
    assert isinstance(bad, BadLine)
    assert bad.reason == "not valid UTF-8"
    assert isinstance(good, Conversation)


def test_files_of_one_name_keep_their_lines_apart(tmp_path):
    files = [write(tmp_path / part / "chats.jsonl", {"prompt": part}) for part in ("a", "b")]
    assert [row.id for row in read_conversations(files)] == ["a/chats.jsonl:1", "b/chats.jsonl:1"]


def test_limit_counts_usable_conversations():
    rows = list(read_conversations([DATA / "malformed.jsonl", DATA / "chats.jsonl"], limit=3))
    assert [row.id for row in rows if isinstance(row, Conversation)] == ["good", "openai", "chats:2"]
    require_clean([DATA / "malformed.jsonl"], limit=1)
